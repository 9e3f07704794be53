"""What needs a run's images or its network: views, neighbours, map and spectrum of features."""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment import Custom, Normalize, View, augment
from ..data import load
from ..evaluate import extract
from ..evaluate.knn import nearest
from ..extras import require
from ..methods import method_class
from ..train import load_backbone, random_backbone
from ..train.backbones import seeded_backbone
from .charts import Series, line_chart, scatter

QUERIES, NEIGHBOURS = 6, 8
IMAGES = 2000
"""At most so many of the test split are mapped."""
_SIDE = 96
"""Longest side of a picture in the page, in pixels."""

# What a run folder or a data set that has changed can cause: a sentence in the page.
_EXPECTED = (OSError, ValueError, ImportError, RuntimeError, KeyError)


def sections(folder: Path, config: dict[str, Any], data: str | None, tsne: bool) -> str:
    """HTML of all pictures; of those that cannot be made a sentence that says why."""
    parts = []
    for title, make in (
        ("Augmented views", lambda: _views(config)),
        ("Features", lambda: _features(folder, config, data, tsne)),
    ):
        try:
            body = make()
        except _EXPECTED as error:
            body = f"<p>Not shown: {escape(' '.join(str(error).split()))}</p>"
        parts.append(f"<section><h2>{title}</h2>{body}</section>")
    return "".join(parts)


def _views(config: dict[str, Any]) -> str:
    """Images and their views in the first epoch, as the network gets them but for normalisation."""
    size = config["image_size"]
    source = load(config["data"], "train", size, config.get("max_side"))
    with torch.random.fork_rng(devices=[]):
        backbone = seeded_backbone(config, source.channels)
        method = method_class(config["method"])(backbone, **config["method_args"])
    views = [_shown(view) for view in method.views(size, source)]
    index = _spaced(len(source), QUERIES)
    images, _ = source.batch(index)
    rendered = augment(images, index, views, seed=config["seed"], epoch=0)
    rows = []
    for row, i in enumerate(index.tolist()):
        cells = [f'<td class="query">{_picture(source[i][0])}</td>']
        cells += [f"<td>{_picture(x[row])}</td>" for x in rendered]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>view {v + 1}<br>{view.size} px</th>" for v, view in enumerate(views))
    return (
        "<p>Training images and what the network sees of them in the first epoch, normalisation "
        "undone. Objects should stay recognisable, and no single colour or position should give an "
        'image away.</p><div class="wide"><table class="pictures"><tr><th>image</th>'
        f"{heads}</tr>{''.join(rows)}</table></div>"
    )


def _shown(view: View | Custom) -> View | Custom:
    """The view with values in [0, 1]: without its normalisation, which is not random."""
    if isinstance(view, Custom):
        return view
    return View(*(spec for spec in view.specs if not isinstance(spec, Normalize)))


def _features(folder: Path, config: dict[str, Any], data: str | None, tsne: bool) -> str:
    networks = {
        "random weights": random_backbone(folder)[0],
        "pretrained": load_backbone(folder)[0],
    }
    size = config["image_size"]
    source = load(data or config["data"], "train", size)
    try:
        source = load(source.name, "test", size)
        split = "test"
    except FileNotFoundError:  # a folder without labels has no test split
        split = "train"
    part = _Part(source, _spaced(len(source), min(IMAGES, len(source))))
    features = {name: extract(network, part, size) for name, network in networks.items()}
    h, y = features["pretrained"]
    y = y if y.dim() == 1 else torch.full((len(h),), -1)
    names = [str(name) for name in source.class_names]
    maps = {name: project(h) for name, (h, _) in features.items()}
    axes = "1st principal component (sd)", "2nd principal component (sd)"
    charts = [scatter(f"{name}: PCA", points, y, names, *axes) for name, points in maps.items()]
    if tsne:
        charts.append(scatter("pretrained: t-SNE", _tsne(h), y, names, "t-SNE 1", "t-SNE 2"))
    spectrum = [
        Series(name, *zip(*enumerate(_spectrum(h), 1), strict=True))
        for name, (h, _) in features.items()
    ]
    charts.append(
        line_chart(
            "Spectrum of the features",
            spectrum,
            x_label="dimension, by size",
            y_label="singular value / largest",
            log=True,
            last=False,
            note="Of centred features. A sudden fall to nothing means that dimensions are unused.",
        )
    )
    where = escape(f"{len(h)} {split} images of {Path(source.name).name}")
    return (
        f"<p>Features of {where}: the network before and after training.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
        f"<h3>Nearest neighbours</h3>{_neighbours(part, h, y, names)}"
    )


class _Part:
    """Some images of a source."""

    def __init__(self, source, index: Tensor):
        self._source, self._index, self.name = source, index, source.name

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int):
        return self._source[int(self._index[i])]

    def batch(self, index: Tensor):
        return self._source.batch(self._index[index])


def _neighbours(part: _Part, h: Tensor, y: Tensor, class_names: list[str]) -> str:
    queries = _spaced(len(h), min(QUERIES, len(h)))
    similarity, found = nearest(h[queries], h, min(NEIGHBOURS + 1, len(h)))
    rows = []
    for q, close, neighbours in zip(queries.tolist(), similarity, found, strict=True):
        name = class_names[y[q]] if y[q] >= 0 else ""
        cells = [f'<td class="query">{_picture(part[q][0])}{_label(name)}</td>']
        others = [
            (s, i) for s, i in zip(close.tolist(), neighbours.tolist(), strict=True) if i != q
        ]
        for s, i in others[:NEIGHBOURS]:
            text, kind = f"{s:.2f}", ""
            if y[q] >= 0 and y[i] >= 0 and y[i] != y[q]:
                text, kind = f"{s:.2f}, {class_names[y[i]]}", ' class="other"'
            cells.append(f"<td{kind}>{_picture(part[i][0])}{_label(text)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = "An image, and the images whose features have the largest cosine with its own."
    if (y >= 0).any():
        note += " Those of another class are framed and named."
    return (
        f'<p>{note}</p><div class="wide"><table class="pictures"><tr><th>image</th>'
        f'<th colspan="{NEIGHBOURS}">nearest first, with the cosine</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _label(text: str) -> str:
    """Below a picture; cut off by the style sheet where it is long, and whole under the pointer."""
    return f'<span title="{escape(text)}">{escape(text)}</span>'


def project(h: Tensor) -> Tensor:
    """The first two principal components of features h (N, D): (N, 2), in units of their spread."""
    centred = h - h.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:2].T
    # Signs of singular vectors are arbitrary: the larger tail points up and right.
    scores = scores * scores.pow(3).mean(0).sign()
    scores = scores / scores.std(0).clamp_min(1e-12)
    return F.pad(scores, (0, 2 - scores.shape[1]))  # features of width 1 have one component


def _tsne(h: Tensor) -> Tensor:
    manifold = require("sklearn.manifold", "demo")
    perplexity = min(30.0, max(1.0, (len(h) - 1) / 3))
    points = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0)
    return torch.from_numpy(points.fit_transform(F.normalize(h, dim=1).numpy()))


def _spectrum(h: Tensor) -> list[float]:
    """Singular values of centred h (N, D) over the largest; N rows around a mean span N - 1."""
    singular = torch.linalg.svdvals((h - h.mean(0)).double())[: max(1, len(h) - 1)]
    return (singular / singular[0].clamp_min(1e-30)).tolist()


def _spaced(n: int, count: int) -> Tensor:
    """`count` numbers at equal distances below n, since sources often come class by class."""
    count = min(n, count)
    return (torch.arange(count) * 2 + 1) * n // (2 * count)


def _picture(image: Tensor) -> str:
    """An <img> of (C, H, W), uint8 or in [0, 1], with its pixels in the page."""
    image = image[0] if image.dim() == 4 else image  # the first frame of a clip
    pixels = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().byte()
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    picture = require("PIL.Image", "train").fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    zoom = max(1, math.floor(_SIDE * 0.75 / max(picture.size)))
    width, height = (side * zoom for side in picture.size)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{width}" height="{height}" src="data:image/png;base64,{code}">'
