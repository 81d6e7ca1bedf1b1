"""The report: its page and figures for runs of every kind, from records written here."""

import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from hawthorn.report import _curves, _participation, _style, _tables, write_report
from server.record import RoundRecord, read_run
from server.writer import RunWriter
from tasks.errors import RecordError
from tasks.params import Layout
from tasks.rng import generator

LAYOUT = Layout(("w",), ((2,),), 2)
VOID = {"meta", "img", "br"}


def write(config, num_rounds: int, *, malicious=(), weighted=True, status="finished", change=None, **changes):
    """Write a run whose attackers are far off; `change(fields)` edits a round's fields."""
    config = config.replace(
        malicious_clients=",".join(map(str, malicious)),
        attack="patch_backdoor(target=0) | scale_update(factor=9)" if malicious else "",
        **{"num_rounds": num_rounds, **changes},
    )
    writer = RunWriter.create(config, LAYOUT)
    initial = {"acc": 0.1, "asr": 0.1 if malicious else None, "acc_all": 0.1, "auc": None}
    facts = {"dataset": "digits", "num_params": 1234567, "torch": "2.0", "client_sizes": [10, 30, 20]}
    writer.write_header(initial=initial, facts=facts)
    for number in range(1, num_rounds + 1):
        draw = generator(config.seed, "report", number)
        clients = sorted(torch.randperm(config.num_clients, generator=draw)[: config.num_sampled].tolist())
        bad = [c for c in clients if c in malicious]
        fields = {
            "round": number,
            "acc": 0.9 - 0.5 / number,
            "asr": 0.3 if malicious else None,
            "seconds": 1.0,
            "sampled": clients,
            "malicious": bad,
            "attacking": bad,
            "clients": clients,
            "dropped": {},
            "weights": [1 / len(clients)] * len(clients) if weighted else None,
            "norms": [9.0 if c in bad else 1.0 for c in clients],
            "aggregate_norm": 1.0,
            "model_norm": 1.0,
            "skipped": None,
            "sha256": f"{number:064x}",
            "acc_all": 0.95,
            "asr_all": 0.4 if malicious else None,
            "auc": 0.7 if malicious else None,
            "seconds_train": 0.7,
            "seconds_aggregate": 0.1,
            "seconds_evaluate": 0.2,
        }
        if change is not None:
            change(fields)
        writer.write_round(RoundRecord(**fields), torch.zeros(2), None)
    writer.write_header(status=status)
    writer.close()
    return read_run(config.run_folder)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))


def report(runs, tmp_path, **arguments) -> Page:
    return Page(write_report(runs, tmp_path / "page" / "report.html", **arguments).read_text())


def drop_one(fields) -> None:
    """Drop the reply of the first client of a round, for a reason with HTML in it."""
    gone = fields["clients"][0]
    fields |= {"dropped": {str(gone): f"error 2: <script>alert({fields['round']})</script>"}}
    for key in ("clients", "weights", "norms"):
        fields[key] = fields[key][1:] if fields[key] is not None else None


def skip(fields) -> None:
    fields |= {"skipped": f"krum wants n >= {fields['round'] + 6}", "weights": None, "aggregate_norm": 0.0}


def test_a_page_holds_everything_and_loads_nothing(config, tmp_path):
    runs = [
        write(config, 5, malicious=(1, 4), name="mean", tau=0.3, change=drop_one),
        write(config, 5, malicious=(1, 4), name="median", weighted=False, rule="median()"),
    ]
    page = report(runs, tmp_path, title="Tables & <b>figures</b>")
    assert "Tables & <b>figures</b>" in page.texts
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "b"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 7  # metrics, rejection, shares, two heat maps, norms, seconds
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    raw = (tmp_path / "page" / "report.html").read_text()
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[^\"]+", "", raw))
    text = " ".join(page.texts)
    assert f"{5:064x}" in text
    assert "prefers-color-scheme: dark" in raw
    assert "No weights per client for median" in text
    assert "<script>alert(1)</script> (the first of 5)" in text  # escaped in the file, shown as text
    with Image.open(tmp_path / "page" / "report.png") as image:
        assert image.width > 1000


def test_the_page_of_the_same_runs_is_the_same_file(config, tmp_path):
    runs = [write(config, 3, malicious=(2,))]
    first = write_report(runs, tmp_path / "one.html").read_bytes()
    assert write_report(runs, tmp_path / "two").read_bytes() == first
    assert (tmp_path / "two.html").exists()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert {path.suffix for path in tmp_path.glob("[!.]*.*")} == {".html", ".png"}


def test_a_page_over_a_png_and_a_page_of_no_run_are_refused(config, tmp_path):
    with pytest.raises(RecordError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RecordError, match=r"NAME\.html"):
        write_report([write(config, 1)], tmp_path / "report.png")


KINDS = {
    "one_round": {"num_rounds": 1},
    "many_rounds": {"num_rounds": 250, "malicious": (1,), "clients_per_round": 2},
    "no_attack": {"num_rounds": 3},
    "no_rounds": {"num_rounds": 0, "status": "running"},
    "many_clients": {"num_rounds": 4, "num_clients": 130, "malicious": tuple(range(0, 130, 2))},
    "never_evaluated": {"num_rounds": 3, "change": lambda f: f.update(acc=None, asr=None, acc_all=None, auc=None)},
    "all_skipped": {"num_rounds": 3, "malicious": (1,), "change": skip},
    "nobody_replied": {
        "num_rounds": 2,
        "change": lambda f: f.update(
            clients=[], weights=None, norms=[], skipped="0", dropped={str(c): "late" for c in f["clients"]}
        ),
    },
    "zero_norms": {"num_rounds": 2, "change": lambda f: f.update(norms=[0.0] * len(f["norms"]), aggregate_norm=0.0)},
    "all_weights_zero": {
        "num_rounds": 2,
        "malicious": (1,),
        "change": lambda f: f.update(weights=[0.0] * len(f["clients"])),
    },
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_page(config, tmp_path, kind):
    values = dict(KINDS[kind])
    run = write(config, values.pop("num_rounds"), tau=0.5, **values)
    page = report([run], tmp_path)
    text = " ".join(page.texts)
    pictures = sum(tag == "img" for tag, _ in page.tags)
    wanted = {"no_rounds": 2, "no_attack": 5, "one_round": 5, "never_evaluated": 5, "zero_norms": 4}
    wanted |= {"nobody_replied": 4, "all_skipped": 5, "all_weights_zero": 5}
    assert pictures == wanted.get(kind, 6)
    said = {
        "no_rounds": "test is marked as running, 0 of 0 rounds are on record",
        "never_evaluated": "test has no evaluated round.",
        "all_skipped": "test skipped every round",
        "nobody_replied": "No usable update is on record.",
        "no_attack": "Nobody attacked in this run.",
        "many_clients": "Shown are 48 of 130 clients: 24 of 65 malicious ones and the 24 benign ones",
        "many_rounds": "Each column is 3 rounds",
    }
    assert said.get(kind, "Run test") in text


@pytest.mark.filterwarnings("error")
def test_six_runs_of_different_kinds_share_a_page(config, tmp_path):
    runs = [
        write(config, 4, name=f"grid/{'a-long-name-' * 4}{n}", malicious=(0,) * (n % 2), weighted=n % 3 > 0)
        for n in range(4)
    ]
    runs += [write(config, 0, name="grid/_empty", status="failed"), write(config, 2, name="grid/+x+")]
    page = report(runs, tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 4 + 5
    assert "#5 _empty is marked as failed, 0 of 0 rounds are on record." in page.texts


def test_curves_start_at_round_0_and_leave_out_what_was_not_measured(config):
    def every_other(fields):
        if fields["round"] % 2:
            fields |= {"acc": None}

    run = write(config, 4, change=every_other)
    assert _curves.series(run, "acc") == ([0, 2, 4], [0.1, 0.9 - 0.25, 0.9 - 0.125])
    assert _curves.series(run, "asr") == ([], [])
    figure = _curves.draw_metrics([run])
    (axes,) = figure.axes  # no ASR, no attack: one panel
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 10], [2, 65], [4, 77.5]])


def test_attack_rounds_are_marked(config):
    run = write(config, 3, malicious=(0,), change=lambda f: f["round"] == 2 and f.update(attacking=[]))
    figure = _curves.draw_metrics([run])
    strip = figure.axes[2].collections[0]
    spans = [path.get_extents().intervalx.tolist() for path in strip.get_paths()]
    assert spans == [[0.5, 1.5], [2.5, 3.5]]


def test_the_heat_map_tells_absent_rejected_weighted_dropped_and_skipped(config):
    def change(fields):
        number = fields["round"]
        fields |= {"sampled": [0, 1, 3], "clients": [0, 1, 3], "norms": [1.0] * 3, "malicious": [3], "attacking": [3]}
        fields["weights"] = [0.75, 0.25, 0.0]
        if number == 2:
            drop_one(fields)
            fields["weights"] = [0.5, 0.5]
        if number == 3:
            skip(fields)

    cells = _participation.read_cells(write(config, 3, num_clients=4, malicious=(3,), change=change))
    assert (cells.clients, cells.num_malicious, cells.width) == ([3, 0, 1, 2], 1, 1)
    nan = np.nan
    wanted = [[0, 1, nan], [2.25, nan, nan], [0.75, 1, nan], [nan, nan, nan]]
    np.testing.assert_allclose(cells.weight, wanted)
    assert cells.present.tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert cells.dropped.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert cells.attacking[0].all()
    assert not cells.attacking[1:].any()
    assert cells.skipped.tolist() == [False, False, True]


def test_the_heat_map_of_many_rounds_averages(config):
    def change(fields):
        late = fields["round"] > 200
        fields["weights"] = [0.0, 1.0] if late else [0.5, 0.5]

    cells = _participation.read_cells(write(config, 241, num_clients=2, change=change))
    assert (cells.width, cells.weight.shape) == (3, (2, 81))
    np.testing.assert_allclose(cells.weight[0, [0, 65, 66, 67, 80]], [1, 1, 2 / 3, 0, 0])
    np.testing.assert_allclose(cells.weight.sum(axis=0), 2)


def test_malicious_clients_keep_half_of_a_full_heat_map(config):
    run = write(config, 1, num_clients=100, malicious=tuple(range(90)))
    clients, num_malicious = _participation.choose_clients(run)
    assert (len(clients), num_malicious, set(clients[38:])) == (48, 38, set(range(90, 100)))


def test_names_lose_shared_folders_and_stay_distinct(config, tmp_path):
    def named(*names):
        return [write(config, 0, name=name, runs_dir=str(tmp_path / str(number))) for number, name in enumerate(names)]

    assert _style.run_labels(named("exp/krum", "exp/mean")) == ["krum", "mean"]
    assert _style.run_labels(named("exp/a/krum", "exp/b/krum")) == ["a/krum", "b/krum"]
    assert _style.run_labels(named("exp", "exp")) == ["exp (1)", "exp (2)"]
    assert _style.run_labels(named("exp/only")) == ["exp/only"]
    assert _style.run_labels(named("x" * 30, "y"))[1] == "#2 y"


def test_tables_group_by_kind_of_reason(config):
    run = write(config, 3, change=drop_one, num_clients=2)
    assert _tables.dropped_replies([run]).rows == [
        ["test", "3", "0", "1–3", "error 2: <script>alert(1)</script> (the first of 3)"]
    ]
    assert _tables.skipped_rounds([write(config, 2, change=skip)]).rows[0][1:3] == ["2", "1–2"]
    assert _tables.ranges([5, 1, 2, 3, 9]) == "1–3, 5, 9"
    assert _tables.ranges(range(0, 60, 2)).endswith("22, …")


def test_settings_that_differ(config):
    runs = [write(config, 1, name="a"), write(config, 1, name="b", rule="median()", server_lr=0.5)]
    table = _tables.settings_that_differ(runs)
    assert table.head == ["setting", "a", "b"]
    assert table.rows == [["rule", "mean()", "median()"], ["server-lr", "1", "0.5"]]
    alone = dict(row[:2] for row in _tables.settings_that_differ(runs[1:]).rows)
    assert alone["rule"] == "median()"
    assert "seed" not in alone
    assert len(_tables.all_settings(runs).rows) == len(config.settings())


def test_a_model_that_is_not_the_last_round_s_is_called_out(config):
    run = write(config, 2)
    run.facts["sha256"] = "0" * 64
    assert any("inconsistent" in text for text in _tables.warnings([run]))
    run.facts["sha256"] = run.rounds[-1].sha256
    assert _tables.warnings([run]) == []


def test_shares_show_the_weight_beside_the_equal_one(config):
    def change(fields):
        fields["weights"] = [0.5] + [0.1] * 5

    run = write(config, 2, malicious=(0,), change=change)
    figure = _curves.draw_shares([run])
    assert "mean 50.0 %" in figure.axes[0].get_title(loc="left") + figure.axes[0].get_title()
    stairs, line = figure.axes[0].patches[0], figure.axes[0].collections[0]
    assert stairs.get_data().values.tolist() == pytest.approx([50.0, 50.0])
    heights = [y for path in line.get_paths() for _, y in path.vertices.tolist()]
    assert heights == pytest.approx([100 / 6] * 4)
    assert _curves.draw_shares([write(config, 2)]) is None


def test_parts_of_a_figure_do_not_overlap(config):
    runs = [write(config, 30, name=f"run-{n}", malicious=(1,)) for n in range(4)]
    with rc_context(_style.STYLE):
        figures = _curves.draw_metrics(runs), _curves.draw_norms(runs), _curves.draw_seconds(runs)
        pictures = [_style.png(figure) for figure in figures]
    for figure, picture in zip(figures, pictures):
        Image.open(BytesIO(picture)).verify()  # drawn, so that positions are final
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for i, one in enumerate(boxes):
            assert 0 <= one.x0 <= one.x1 <= figure.bbox.width + 1
            for other in boxes[:i]:
                width = min(one.x1, other.x1) - max(one.x0, other.x0)
                height = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert min(width, height) < 3  # pixels, at 144 per inch
