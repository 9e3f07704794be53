"""The page about a run: what stands in it, what is drawn, and that nothing in it can run."""

import base64
import html.parser
import io
import json
import math
import re
import shutil

import pytest
import torch

from fastssl.augment import augment, small
from fastssl.cli import main
from fastssl.config import PretrainConfig
from fastssl.data import TensorSource
from fastssl.evaluate import evaluate
from fastssl.report import charts, page, pictures, report
from fastssl.report.charts import Series, line_chart, scatter
from fastssl.report.pictures import project
from fastssl.train import pretrain

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")


class Page(html.parser.HTMLParser):
    """The tags of a page, what they refer to, and its text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read_page(path):
    """The page, after a look that it needs no network and runs nothing."""
    text = path.read_text()
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "b:x"} & {*found.tags}
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert "url(" not in text and "@import" not in text
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One epoch on the digits, evaluated."""
    out = tmp_path_factory.mktemp("runs") / "first"
    path = pretrain(PretrainConfig(out=out, epochs=1, device="cpu")).path
    for weights in ("random", "pretrained"):
        evaluate(path, protocols=["knn", "diagnostics"], weights=weights)
    return path


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_the_page_of_a_run(run):
    path = report(run)
    assert path == run / "report.html"
    found = read_page(path)
    results = json.loads((run / "results.json").read_text())["digits"]
    values = [results[w]["knn"]["top1_percent"]["knn-20"] for w in ("random", "pretrained")]
    gap = f"{values[1] - values[0]:+.2f}"
    assert f"knn-20, % {values[0]:.2f} {values[1]:.2f} {gap}" in found.text
    for text in (
        "finished: 1 epochs, 4 steps", "online kNN", "peak memory", "Protocol: pretrained",
        "method_args.temperature 0.2", "Spectrum of the features", "Nearest neighbours", "torch",
        "Accuracy of frozen features while training", "540 test images of digits",
    ):  # fmt: skip
        assert text in found.text, text
    assert "Not shown" not in found.text and "Warnings" not in found.text
    views, neighbours = pictures.QUERIES * 3, pictures.QUERIES * (1 + pictures.NEIGHBOURS)
    assert found.tags.count("img") == views + neighbours
    assert path.stat().st_size < 400_000


def test_deviations_of_numbers_that_are_no_percentages(copy):
    results = {"alignment": 0.6048, "sd": {"alignment": 0.0131}, "protocol": {}}
    text = json.dumps({"digits": {"pretrained": {"alignment": results}}})
    (copy / "results.json").write_text(text)
    assert "alignment 0.6048 ± 0.0131" in read_page(report(copy, images=False)).text


def test_numbers_and_data_sets_of_one_name_are_told_apart(copy):
    result = {"top1_percent": {"clean": 50.0}, "calibration_error": {"clean": 0.1}, "protocol": {}}
    data = {name: {"pretrained": {"robustness": result}} for name in ("/a/pets", "/b/pets", "/c")}
    (copy / "results.json").write_text(json.dumps(data))
    text = read_page(report(copy, images=False)).text
    assert "robustness: clean, % 50.00" in text
    assert "robustness: calibration_error clean 0.1" in text
    assert "On /a/pets" in text and "On /b/pets" in text and "On c" in text


def test_a_comparison(run, copy, tmp_path):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("temperature: 0.2", "temperature: 0.5"))
    (copy / "summary.json").unlink()
    path = report(run, copy, out=tmp_path / "deep" / "both.html")
    found = read_page(path)
    assert "method_args.temperature 0.2 0.5" in found.text and "lr 0.003" not in found.text
    assert "not finished: step 4, in epoch 1 of 1" in found.text
    assert "first, random" in found.text and "copy, pretrained" in found.text
    assert report(run, copy) == run.parent / "comparison.html"
    assert "Nothing but the folder" in read_page(report(run, run, images=False)).text


def test_what_comes_from_the_user_cannot_become_a_tag(copy, tmp_path):
    evil = "<script>alert(1)</script>"
    (copy / "warnings.txt").write_text(f"3\tstep 3: {evil}\n")
    corrupt = f"/data/{evil}\udcff.png\tbad {evil}\n" * 150
    (copy / "corrupt.txt").write_text(corrupt, "utf-8", "surrogateescape")
    results = {
        evil: {"pretrained": {"knn": {"top1_percent": {evil: 1.0}, "protocol": {evil: evil}}}}
    }
    (copy / "results.json").write_text(json.dumps(results))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0, "loss": 1.0, evil: 3.0}) + "\n")
    config = (copy / "config.yaml").read_text().replace("data: digits", f"data: '{evil}'")
    (copy / "config.yaml").write_text(config)
    folder = copy.rename(tmp_path / "<script>alert(2)")
    for path in (report(folder), report(folder, folder)):
        found = read_page(path)
        assert found.text.count(evil) > 4
        assert "150 files could not be read" in found.text and "and 50 more" in found.text


def test_names_of_classes_are_escaped(run, tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (30, 1, 8, 8)).byte()
    names = ["<script>a", "b & <b:x>", "</td>"]
    source = TensorSource("few", pixels, torch.arange(30) % 3, names)
    monkeypatch.setattr(pictures, "load", lambda *args: source)
    found = read_page(report(run, out=tmp_path / "page.html"))
    assert "<script>a" in found.text and "</td>" in found.text


def test_an_unfinished_run_says_what_is_missing(copy, tmp_path):
    for name in ("summary.json", "backbone.safetensors", "results.json", "environment.json"):
        (copy / name).unlink()
    found = read_page(report(copy))
    assert "not finished" in found.text and "Not evaluated yet: fastssl evaluate" in found.text
    assert "Not shown: load_backbone:" in found.text and "the run has not finished" in found.text
    assert found.tags.count("img") == pictures.QUERIES * 3, "views need no network"
    (copy / "metrics.jsonl").unlink()
    found = read_page(report(copy))
    assert "No metrics yet." in found.text and "no record yet" in found.text
    config = (copy / "config.yaml").read_text().replace("data: digits", "data: /nowhere")
    (copy / "config.yaml").write_text(config)
    found = read_page(report(copy))
    assert "Not shown: load: " in found.text and "/nowhere" in found.text
    assert "Augmented views" not in read_page(report(copy, images=False)).text


def test_a_run_that_diverged_says_so_until_it_goes_on(copy):
    bad = {"step": 9, "what": "gradient", "parameter": "head.0.weight"}
    (copy / "bad_batch.json").write_text(json.dumps(bad))
    text = "the gradient was not finite at step 9 (first parameter: head.0.weight)"
    assert text in read_page(report(copy, images=False)).text
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "epoch": 0, "loss": 1.0}) + "\n")
    assert text not in read_page(report(copy, images=False)).text


def test_the_best_of_held_out_images(copy):
    summary = json.loads((copy / "summary.json").read_text())
    summary |= {"best_step": 3, "best_held_out_top1_percent": 91.25}
    (copy / "summary.json").write_text(json.dumps(summary))
    assert "91.2 % at step 3 best held-out" in read_page(report(copy, images=False)).text


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="report: .* is not a run: it has no config.yaml"):
        report(tmp_path)
    with pytest.raises(ValueError, match="report: runs must name at least one"):
        report()


def test_the_command(run, copy, tmp_path, capsys):
    assert main(["report", str(run), "--no-images"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    out = tmp_path / "x.html"
    assert main(["report", str(run), str(copy), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.stat().st_size > 10_000
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def coordinates(figure):
    """Points of each line of a chart, in pixels."""
    lines = re.findall(r'class="line" stroke="([^"]+)"[^>]* d="M([^"]+)"', figure)
    return {
        colour: [tuple(map(float, pair.split())) for pair in path.removesuffix("h0").split("L")]
        for colour, path in lines
    }


def texts(figure):
    return re.findall(r"<text[^>]*>([^<]+)</text>", figure)


def test_a_line_lies_where_its_ticks_say():
    figure = line_chart(
        "t", [Series("a", [0, 5, 10], [0.0, 5.0, 10.0])], x_label="x", y_label="y", zero=True
    )
    (points,) = coordinates(figure).values()
    assert points == [(58, 192), (303, 100), (548, 8)], "the corners and the middle"
    ticks = dict(re.findall(r'<text x="52" y="([\d.]+)" text-anchor="end">([^<]+)<', figure))
    assert ticks == {
        "196.0": "0",
        "159.2": "2",
        "122.4": "4",
        "85.6": "6",
        "48.8": "8",
        "12.0": "10",
    }


def test_values_that_are_no_numbers_break_nothing():
    series = [
        Series("a", [1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0]),
        Series("none", [], []),
        Series("c", [1, 2], [0.5, 0.0]),
    ]
    shown = coordinates(line_chart("t", series, x_label="x", y_label="y"))
    assert {colour: len(points) for colour, points in shown.items()} == {
        "var(--c0)": 2, "var(--c2)": 2,
    }  # fmt: skip
    shown = coordinates(line_chart("t", series, x_label="x", y_label="y", log=True))
    assert len(shown["var(--c2)"]) == 1, "zero has no logarithm"
    assert line_chart("t", series[1:2], x_label="x", y_label="y") == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-7, 1e-7], [-5.0, 1e9], [1e-9, 2e-9]])
@pytest.mark.parametrize("log", [False, True])
def test_every_axis_has_ticks_inside(values, log):
    positive = [abs(v) + 1e-12 for v in values] if log else values
    axis = charts._Axis(min(positive), max(positive), 200, 10, log=log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12 and len({charts._tick(t) for t in ticks}) == len(ticks)
    assert all(10 - 1e-6 <= axis(tick) <= 200 + 1e-6 for tick in ticks)


def test_ticks_are_short_enough_for_their_place():
    values = [0.0, 1.5e-4, 5e-4, 0.0015, 0.25, 12, 9999, 15_000, 2.5e6, -3e-5, 1e9]
    assert [charts._tick(value) for value in values] == [
        "0", "1.5e-4", "5e-4", "0.0015", "0.25", "12", "9999", "15k", "2.5M", "-3e-5", "1G",
    ]  # fmt: skip


def test_long_runs_are_thinned_to_means():
    noisy = Series("a", range(100_000), [float(i % 2) for i in range(100_000)])
    (points,) = coordinates(line_chart("t", [noisy], x_label="x", y_label="y")).values()
    assert len(points) <= charts._MOST_POINTS and len({y for _, y in points}) == 1


def test_prototypes_have_a_line_at_ln_k(copy):
    records = (copy / "metrics.jsonl").read_text().splitlines()
    records = [
        {**json.loads(r), "prototypes": 3000.0, "effective_prototypes": 9.0} for r in records
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read_page(report(copy, images=False)).text
    assert "ln 3000: all images alike" in found and "K = 3000" in found


@pytest.mark.parametrize("classes", [0, 3, 25])
def test_scatter_takes_any_number_of_classes(classes):
    y = torch.arange(80) % classes if classes else torch.full((80,), -1)
    figure = scatter("t", torch.randn(80, 2), y, [f"class {c}" for c in range(classes)], "x", "y")
    assert len(re.findall(r"M[\d.]+ [\d.]+h0", figure)) == 80
    assert ("25 classes" in figure) == (classes == 25)
    assert ("without label" in figure) == (classes == 0)


def test_project_finds_the_axes_of_largest_variance():
    spread = torch.tensor([[0.1, 5.0, 1.0, 0.01]])
    h = 7 + torch.randn(400, 4) * spread
    points = project(h)
    assert abs(torch.corrcoef(torch.stack((points[:, 0], h[:, 1])))[0, 1]) > 0.99
    assert abs(torch.corrcoef(torch.stack((points[:, 1], h[:, 2])))[0, 1]) > 0.99
    torch.testing.assert_close(points.std(0), torch.ones(2))


def test_project_settles_the_signs():
    for _ in range(10):
        h = torch.randn(100, 4).exp() @ torch.randn(4, 4)
        assert (project(h).pow(3).mean(0) > 0).all(), "the larger tail points up and right"


def test_project_of_collapsed_or_narrow_features_is_finite():
    assert project(torch.ones(20, 5)).isfinite().all()
    assert project(torch.randn(20, 1)).shape == (20, 2)


def test_the_spectrum_is_of_centred_features():
    h = 100 + torch.randn(500, 3) * torch.tensor([4.0, 2.0, 1.0])
    assert pictures._spectrum(h) == pytest.approx([1, 0.5, 0.25], rel=0.15)
    assert len(pictures._spectrum(torch.randn(3, 10))) == 2


def test_views_are_shown_without_normalisation():
    images, index = torch.randint(0, 256, (4, 3, 16, 16)).byte(), torch.arange(4)
    view = small(16, 3, flip=True)
    (seen,) = augment(images, index, [view], seed=0, epoch=0)
    (shown,) = augment(images, index, [pictures._shown(view)], seed=0, epoch=0)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen * std + mean, shown, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 300, 40), (5, 20, 20), (4, 3, 16, 16)])
def test_pictures_of_any_channels_and_size(shape):
    for image in (torch.randint(0, 256, shape).byte(), torch.rand(shape)):
        code = re.search(r"base64,([^\"]+)", pictures._picture(image)).group(1)
        picture = Image.open(io.BytesIO(base64.b64decode(code)))
        assert picture.mode == "RGB" and max(picture.size) <= pictures._SIDE


def test_neighbours_leave_out_the_image_itself_and_name_other_classes():
    pixels = torch.randint(0, 256, (12, 3, 8, 8)).byte()
    source = TensorSource("few", pixels, torch.arange(12) % 2, ["even", "odd"])
    h = torch.eye(12) + 0.5
    h[1] = h[0]  # a copy of the first image, of the other class
    part = pictures._Part(source, torch.arange(12))
    table = pictures._neighbours(part, h, source.labels, ["even", "odd"])
    rows = table.split("<tr>")[2:]
    assert len(rows) == pictures.QUERIES
    assert all(row.count("<img") == 1 + pictures.NEIGHBOURS for row in rows)
    assert "1.00, even" in rows[0], "the copy of the first query"
    assert not any("1.00" in row for row in rows[1:]), "no query is its own neighbour"


def test_names_that_two_runs_share_get_their_folder(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "second" / "first")
    names = page._names([page.read(run), page.read(other)])
    assert names == [f"{run.parent.name}/first", "second/first"]


def test_tsne(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "IMAGES", 60)
    assert "pretrained: t-SNE" in report(run, out=tmp_path / "x.html", tsne=True).read_text()
