"""Wrong use is one clear line and exit code 2: what was given, what is allowed, the nearest right name."""

import sys

import pytest

from saigen import cli


@pytest.fixture
def saigen(monkeypatch, capsys, plugin, store):
    """Calls the command line in this process and returns (exit code, stdout, stderr)."""

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["saigen", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "mean_of_nois"], "did you mean 'mean_of_noise'"),
        (["run"], "which papers"),
        (["run", "mean_of_noise", "--all"], "not two of them"),
        (["run", "mean_of_noise", "--claim", "averaging"], "averaging_shrinks_noise"),
        (["run", "mean_of_noise", "--scale", "labtop"], "did you mean 'laptop'"),
        (["run", "mean_of_noise", "--scale", "full"], "has no experiment at scale 'full'"),
        (["run", "mean_of_noise", "--seeds", "0"], "allowed is 1 to 20"),
        (["run", "mean_of_noise", "--seeds", "21"], "allowed is 1 to 20"),
        (["run", "mean_of_noise", "--seeds", "-3"], "allowed is 1 to 20"),
        (["run", "mean_of_noise", "--seeds", "many"], "'--seeds'"),
        (["run", "mean_of_noise", "--jobs", "0"], "at least 1"),
        (["run", "mean_of_noise", "--device", "cuda:7"], "cannot use"),
        (["run", "mean_of_noise", "--device", "gpu"], "cannot use"),
        (
            ["run", "mean_of_noise", "--device", "cud"],
            "which this machine cannot use, did you mean 'cuda'?: it has cpu",
        ),
        (["run", "mean_of_noise", "--device", "cpu:"], "it has cpu"),
        (["run", "mean_of_noise", "--device", "meta"], "it has cpu"),
        (["run", "mean_of_noise", "--data", "."], "--data goes with --scale real or full"),
        (["run", "mean_of_noise", "--seeds=many"], "--seeds is 'many': Invalid value"),
        (["run", "mean_of_noise", "--jobs", "1", "--jobs", "1.5"], "--jobs is '1.5': Invalid value"),
        (["run", "mean_of_noise", "--data", "/nowhere/at/all"], "nothing there"),
        (["run", "mean_of_noise", "--backend", "rya"], "did you mean 'ray'"),
        (["run", "mean_of_noise", "--settle", "--seeds", "3"], "leave --seeds out"),
        (["run", "mean_of_noise", "--lang", "fr"], "allowed are en and ja"),
        (["run", "--domain", "visoin"], "there is no domain"),
        (["show", "mean_of_nose"], "did you mean"),
        (["list", "--tag", "statistic"], "did you mean 'statistics'"),
        (["list", "--rung", "9"], "'--rung'"),
        (["apply", "mean_of_noise", "a", "--out", "b"], "does not map files to files"),
        (["publish", "mean_of_noise"], "no fresh local measurements"),
        (["digest", "2019-part-2"], "did you mean '2019-part-1'"),
        (["report", "nothing_like_it"], "there is no paper"),
        (["report", "--lang", "fr"], "allowed are en and ja"),
        (["bench", "mean_of_noise"], "has a benchmark"),
        (["new", "2501.00001", "--domain", "vision"], "give the room's slug"),
        (["new", "Bad-Slug", "--domain", "vision"], "the slug is"),
        (["new", "a_new_one", "--domain", "visoin"], "did you mean 'vision'"),
        (
            ["new", "mean_of_noise", "--domain", "vision"],
            "has a room already, and slugs are unique: analysis/mean_of_noise",
        ),
        (
            ["new", "1911.00068", "--domain", "vision"],
            "arXiv 1911.00068 has a room already: data_quality/confident_learning",
        ),
        (
            ["new", "arXiv:1911.00068v6", "--domain", "vision", "--slug", "a_new_one"],
            "`saigen show confident_learning`",
        ),
        (["new", "https://arxiv.org/pdf/1911.00068.pdf", "--domain", "vision"], "data_quality/confident_learning"),
        (["new", "2501.00001", "--domain", "vision", "--slug", "sam"], "training/sam"),
        (["list", "--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use(saigen, arguments, said):
    code, _, err = saigen(*arguments)
    assert code == 2, err
    assert said in " ".join(err.split()), err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["list", "show", "run", "apply", "publish", "report", "digest", "bench", "new"])
def test_every_command_has_help(saigen, command):
    code, out, _ = saigen(command, "--help")
    assert code == 0 and f"Usage: saigen {command}" in out


def test_a_warning_is_one_line_without_its_place_in_the_code(capsys, monkeypatch):
    monkeypatch.setattr(cli.warnings, "showwarning", cli._show_warning)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.warnings, "filters", [])
        cli.warnings.warn_explicit("w.pt is a pickle;\nonly its tensors are read", UserWarning, "somewhere.py", 7)
    assert capsys.readouterr().err == "warning: w.pt is a pickle; only its tensors are read\n"


def test_alone_it_shows_the_help(saigen):
    code, out, err = saigen()
    assert code == 0 and "Begin with saigen list" in " ".join(out.replace("`", "").split()) and not err


def test_a_tiny_run_is_not_called_not_run(saigen):
    code, out, _ = saigen("run", "mean_of_noise", "--scale", "tiny", "--seeds", "1")
    assert code == 0 and "tiny" in out and "not run" not in out


def test_help_names_what_there_is_to_choose_from(saigen, monkeypatch):
    from saigen.cards.schema import DOMAINS
    from saigen.report.digest import lists

    monkeypatch.setenv("COLUMNS", "200")
    assert all(name in saigen("digest", "--help")[1] for name in lists())
    assert all(name in saigen("new", "--help")[1] for name in DOMAINS)
    assert "saigen[peers]" in saigen("bench", "--help")[1]
    said = saigen("apply", "confident_learning", "--help")[1]
    assert "--pred-probs" in said and "ValueError" not in said


def test_an_unwritable_store_is_one_line(saigen, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAIGEN_HOME", str(tmp_path / "file" / "x"))
    code, _, err = saigen("run", "mean_of_noise")
    assert code == 2 and "SAIGEN_HOME" in err


def test_a_report_does_not_overwrite_what_is_not_a_report(saigen, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("years of work")
    code, _, err = saigen("report", "--out", str(precious))
    assert code == 2 and "not an earlier report" in err
    assert (precious / "chapter.tex").read_text() == "years of work"


def test_a_broken_card_in_a_plug_in_leaves_the_others_working(saigen, monkeypatch, tmp_path):
    from saigen.cards import catalogue

    room = tmp_path / "broken_papers" / "vision" / "broken_room"
    room.mkdir(parents=True)
    (tmp_path / "broken_papers" / "__init__.py").touch()
    (room / "card.toml").write_text('title = "no end')
    info = tmp_path / "broken_papers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-papers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saigen.papers]\nbroken = broken_papers\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    catalogue.refresh()
    code, out, err = saigen("list")
    assert code == 0 and "mean_of_noise" in out
    assert "broken_room" in err and "left out" in err
    code, _, err = saigen("show", "broken_room")
    assert code == 2 and "cannot be read" in err


def test_a_plug_in_is_not_imported_to_be_listed(saigen):
    assert saigen("list")[0] == 0
    assert not [name for name in sys.modules if name.startswith("hello_papers")]


def test_japanese(saigen):
    _, out, _ = saigen("show", "mean_of_noise", "--lang", "ja")
    assert "雑音の平均" in out and "判定" in out


def test_slugs_and_verdicts_do_not_wrap(saigen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = saigen("run", "mean_of_noise")
    assert "averaging_shrinks_noise" in out and "reproduced" in out


def test_create_model_through_the_front_door(plugin):
    import saigen as front

    assert front.list_models("mean*") == ["mean_net"]
    assert front.create_model("mean_net", num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match="did you mean 'mean_net'"):
        front.create_model("mean_nte")
    with pytest.raises(ValueError, match="did you mean 'features'"):
        front.create_model("mean_net", feature=3)
    for wrong in (-1, 2.5, "ten"):
        with pytest.raises(ValueError, match=f"num_classes is {wrong!r}, allowed is a whole number"):
            front.create_model("mean_net", num_classes=wrong)


def test_unwritable_output(saigen, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = saigen("report", "--out", str(tmp_path / "file" / "y"))
    assert code == 2 and "cannot write" in err
