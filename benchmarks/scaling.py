"""What sharded negatives send, and floors of their time: prints the tables of docs/distributed.md.

The bytes are exact, tests count them. The times are arithmetic on the assumed rates below: no GPU
has been measured.
"""

from itertools import count

PRODUCT = 790e12  # operations a second of bf16 products, assumed of an H200
NVLINK = 370e9  # bytes a second that a GPU receives in collectives inside a node
INFINIBAND = 45e9  # the same between nodes: one 400 Gb/s adapter for each GPU
NODE = 8  # GPUs of a node
SUM = 4  # bytes of a sum, fp32


def wire_bytes(loss: str, exchange: str, rows: int, D: int, item: int, W: int, each: int = 1):
    """Received by each of W ranks in a forward and backward where all inputs take a gradient.

    Args:
        loss: "clip" (info_nce with symmetric=True), "info_nce" (in one direction), "nt_xent"
            (info_nce with k=None), "siglip", "queue" (queue_nce with queue_sharded=True).
        rows: of keys (of queries, for a queue) of each rank; where a place of the ring is a node
            of `each` ranks, of all of these.
        item: bytes of a feature's element.
    """
    keys, sums, hops = rows * D * item, rows * D * SUM, W - 1
    if loss == "queue":  # a log-sum-exp beside each sum, no gradient to bring home
        features = hops * (keys + sums + rows * SUM)
    elif exchange == "gather":
        features = hops * (keys + sums)
    elif loss == "nt_xent":  # half round, and the sums straight home
        features = W // 2 * (2 * keys + sums)
    else:  # round once more in the backward, but for a gradient that the forward makes
        features = hops * (keys * (1 if loss == "siglip" else 2) + sums)
    # By column a log-sum-exp to merge, then it and its upstream gradient to every rank.
    numbers = 3 * SUM * rows * each if loss in ("clip", "nt_xent") else 0
    agreement, mean = 128 * each, 2 * SUM / W
    return features + hops * (numbers + agreement + mean)


def hybrid_bytes(loss: str, rows: int, D: int, item: int, nodes: int, each: int):
    """(between nodes, inside a node): rows go round the nodes, gathered in a node at each step."""
    between = wire_bytes(loss, "ring", rows, D, item, nodes, each)
    steps = nodes // 2 + 1 if loss == "nt_xent" else nodes
    features = (each - 1) * rows * D * ((1 if loss == "siglip" else 2) * item + SUM)
    numbers = wire_bytes(loss, "gather", rows, 0, item, each)
    return between, steps * features + numbers


def link(W: int) -> float:
    return NVLINK if W <= NODE else INFINIBAND


def floors(N: int, D: int, W: int) -> dict[str, float | None]:
    """Seconds of CLIP's loss in bf16: compute alone, and with each exchange.

    Nothing overlaps a gather. Round a ring a step takes its products or its transfers, whichever
    is longer: one product and a block of keys in the forward, three and keys and sums in the
    backward.
    """
    product = 2 * N * N * D / W / PRODUCT
    keys, sums = N // W * D * 2, N // W * D * SUM

    def around(steps: int, rate: float) -> float:
        forward = max(product, steps * keys / rate)
        return forward + max(3 * product, steps * (keys + sums) / rate)

    found = {
        "compute": 4 * product,
        "gather": 4 * product + wire_bytes("clip", "gather", N // W, D, 2, W) / link(W),
        "ring": around(W, link(W)),
        "hybrid": None,
    }
    if W > NODE:
        inside = hybrid_bytes("clip", N // W, D, 2, W // NODE, NODE)[1]
        found["hybrid"] = around(W // NODE, INFINIBAND) + inside / NVLINK
    return found


def overtaken(N: int, D: int, exchange: str) -> int:
    """Ranks, in whole nodes, from which on the exchange takes longer than the products."""
    for nodes in count(1):
        W = nodes * NODE
        compute = 8 * N * N * D / W / PRODUCT
        if wire_bytes("clip", exchange, N // W, D, 2, W) / link(W) > compute:
            return W


def page() -> str:
    lines = [
        "| N | D | W | received, gather | ring | compute | with gather | ring | hybrid |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = [(N, D) for N in (32768, 262144) for D in (512, 1024)]
    for N, D in sizes:
        for W in (8, 64, 512):
            received = [
                f"{wire_bytes('clip', e, N // W, D, 2, W) / 1e6:.0f} MB" for e in ("gather", "ring")
            ]
            times = ["" if t is None else f"{1e3 * t:.2f} ms" for t in floors(N, D, W).values()]
            lines.append("| " + " | ".join([f"{N} | {D} | {W}", *received, *times]) + " |")
    lines += ["", "| N | D | gather overtakes compute at W | ring |", "|---|---|---|---|"]
    for N, D in sizes:
        lines.append(f"| {N} | {D} | {overtaken(N, D, 'gather')} | {overtaken(N, D, 'ring')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
