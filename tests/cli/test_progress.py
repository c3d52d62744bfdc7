"""How far a command is, where stderr is no terminal."""

from jaximm.cli import progress


def test_a_long_run_has_a_line_now_and_then_where_it_is_piped(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 25.0, 30.0])
    monkeypatch.setattr(progress, "_clock", lambda: next(clock))
    with progress.Progress(1) as told:
        for done in (10, 1000, 1100, 2500):
            told("limit s0", done, 3000, {})
        told("limit s0", 3000, 3000, {})
    assert capsys.readouterr().err.splitlines() == [
        "limit s0: 1,000 of 3,000 steps, 11 s",
        "limit s0: 2,500 of 3,000 steps, 25 s",
        "[1/1] limit s0: 3,000 steps, 30.0 s",
    ]


def test_what_a_record_says_is_shown_at_once(capsys):
    with progress.Progress(1) as told:
        told("frozen stages", 0, 5000, {"unit": "images", "says": "about 5 min, for [all] images"})
    assert capsys.readouterr().err.splitlines() == ["frozen stages: about 5 min, for [all] images"]
