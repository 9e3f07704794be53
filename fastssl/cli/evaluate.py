"""fastssl evaluate: measure what a network's features are worth."""

import argparse
import os
from pathlib import Path

from .parser import Parser, list_of, main_rank, names


def run(argv: list[str]) -> int:
    from ..evaluate import PROTOCOLS, FeatureCache, evaluate, merge_results, read_results, table

    parser = Parser(
        "evaluate",
        "CKPT [--data DATA] [--protocol LIST] [options]",
        "Measure what a network's features are worth on labelled images. CKPT: a run's folder, a\n"
        "file of weights, timm:NAME or torchvision:NAME. The numbers and the full protocol are\n"
        "merged into RUN/results.json, or into --out.",
    )
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="what is evaluated")
    add("--data", metavar="DATA", help="`digits`, `patches`, `shapes` or a folder with one"
        " subfolder per class. Default: the images of the run.")  # fmt: skip
    add("--protocol", metavar="LIST", type=names, help=f"any of {', '.join(PROTOCOLS)}; commas"
        " between. Default: knn,linear,kshot.")  # fmt: skip
    add("--random", action="store_true",
        help="also evaluate the same network before training, and show the gap.")  # fmt: skip
    add("--weights", choices=("pretrained", "random"), default="pretrained", metavar="NAME",
        help="pretrained, of timm and torchvision those published, or random."
        " Default: pretrained.")  # fmt: skip
    add("--backbone", metavar="NAME", help="of a file of weights that does not say whose they are:"
        " resnet_small, timm:NAME ...")  # fmt: skip
    add("--split", default="test", metavar="NAME", help="test, or held-out: a tenth of the"
        " training split, for choices. Default: test.")  # fmt: skip
    add("--labels", metavar="FILE", help="CSV file of several labels an image.")
    add("--masks", metavar="DIR", help="folder of masks for segmentation, PNG of class numbers.")
    add("--image-size", metavar="N", type=int, help="Default: the network's own.")
    add("--batch-size", metavar="N", type=int, default=256,
        help="images per forward pass. Default: 256.")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto.")
    add("--cache", metavar="DIR", help="kept features. Default: beside torch's cached files.")
    add("--no-cache", action="store_true", help="compute features again and keep none.")
    add("--out", metavar="FILE", help="JSON file for the results. Default: RUN/results.json.")
    add("--plots", action="store_true", help="write the run's report.html.")
    group = parser.add_argument_group("settings of protocols", "Each goes to all that have it.")
    for name, (kind, metavar, text) in _SETTINGS.items():
        flag, text = f"--{name.replace('_', '-')}", text.replace("%", "%%")
        group.add_argument(
            flag, dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    group.add_argument(
        "--no-augmentation",
        dest="augmentation",
        action="store_false",
        default=argparse.SUPPRESS,
        help="linear-sgd on features of whole images, computed once.",
    )
    options = vars(parser.parse(argv))
    known = (*_SETTINGS, "augmentation")
    settings = {name: options.pop(name) for name in known if name in options}

    from ..outputs import check_file
    from ..train.ranks import Ranks

    if options["out"]:
        check_file("evaluate", options["out"])
        read_results(options["out"])  # which the results are merged into
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ranks = Ranks.start(options["device"]) if several else None
    cache = None if options["no_cache"] else FeatureCache(options["cache"])
    results = {}
    try:
        for weights in ("random", "pretrained") if options["random"] else (options["weights"],):
            results[weights] = evaluate(
                options["ckpt"],
                options["data"],
                options["protocol"],
                weights=weights,
                cache=cache,
                device=str(ranks.device) if ranks else options["device"],
                **{key: options[key] for key in _OPTIONS},
                **settings,
            )
    finally:
        if ranks:
            ranks.close()
    if not main_rank():
        return 0
    print(table(results))
    if options["out"]:
        for weights, found in results.items():
            merge_results(Path(options["out"]), weights, found)
        print(f"written to {options['out']}")
    if Path(options["ckpt"], "results.json").is_file():
        print(f"written to {Path(options['ckpt'], 'results.json')}")
    if options["plots"]:
        from ..report import report

        print(report(options["ckpt"], data=options["data"]))
    return 0


_numbers, _floats = list_of(int, "whole numbers"), list_of(float, "numbers")
_OPTIONS = ("backbone", "split", "labels", "masks", "image_size", "batch_size")
# Type, metavar and help of what protocols take; their defaults are in their docstrings.
_SETTINGS = {
    "seeds": (int, "N", "runs or draws of each number, for mean and deviation."),
    "ks": (_numbers, "LIST", "neighbours of knn and knn-loo; k of retrieval's recall@k."),
    "metric": (str, "NAME", "of knn: cosine or l2. Default: cosine."),
    "votes": (str, "NAME", "of knn: softmax, distance or uniform. Default: softmax."),
    "temperature": (float, "X", "of softmax votes. Default: 0.07."),
    "l2_grid": (_floats, "LIST", "candidates of linear and multilabel."),
    "shots": (_numbers, "LIST", "labels per class for kshot and finetune. Default: 1,5,10."),
    "shares": (_floats, "LIST", "of the labels, for subset and finetune: 0.01,0.1 for 1 and 10 %."),
    "preset": (str, "NAME", "of linear-sgd: moco, simclr, dino, mae, lejepa. Default: simclr."),
    "rates": (_floats, "LIST", "learning rates of linear-sgd, one head each."),
    "weight_decays": (_floats, "LIST", "of linear-sgd, one head each."),
    "last_blocks": (_numbers, "LIST", "numbers of last blocks for linear-sgd, one head each."),
    "recipe": (
        str,
        "NAME",
        "of finetune: vit, thorax, cnn, simclr, simclr_v2, swav. Default: by the network.",
    ),
    "epochs": (int, "N", "of linear-sgd, finetune and segmentation."),
    "train_batch_size": (int, "N", "of linear-sgd, finetune and segmentation."),
    "lr": (float, "X", "of finetune and segmentation."),
    "weight_decay": (float, "X", "of finetune and segmentation."),
    "layer_decay": (float, "X", "of finetune: rate of a block over that of the next."),
    "drop_path": (float, "X", "of finetune."),
    "mixup": (float, "X", "of finetune; needs torchvision."),
    "cutmix": (float, "X", "of finetune; needs torchvision."),
    "rand_augment": (int, "N", "of finetune: magnitude of RandAugment, of 10; needs torchvision."),
    "from_head": (int, "N", "layers of the pretraining head that finetune keeps. Default: 0."),
    "save": (str, "FILE", "for the classifier that finetune made, for `pretrain distill`."),
    "pool": (str, "NAME", "of finetune: own features, or patches, the mean of the last map."),
    "precision": (str, "NAME", "of finetune: fp32, bf16, auto."),
    "templates": (str, "FILE", "prompts of zero-shot, one a line, {} for the name of a class."),
    "disturbances": (names, "LIST", "of robustness. Default: all."),
    "shifts": (names, "LIST", "data sets robustness scores too."),
    "groups": (str, "FILE", "CSV file, image and group, for groups. Default: classes."),
}
