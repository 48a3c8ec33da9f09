"""Running: what was measured is kept and not measured again, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saigen import runner
from saigen.claims import evidence
from saigen.data import split
from saigen.runner import Options, plan, run_tasks

SLUG = "mean_of_noise"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "saigen", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def numbers(document: str) -> list:
    return [[m["seed"], m["values"]] for result in json.loads(document)["results"] for m in result["measurements"]]


def test_the_same_seed_gives_the_same_numbers_and_others_differ(plugin, store):
    tasks = plan([plugin], Options(jobs=1))
    first = [runner.execute(task).measurement.values for task in tasks]
    assert first == [runner.execute(task).measurement.values for task in tasks]
    assert len({str(values) for values in first}) == 5


def test_parallel_and_serial_give_the_same_numbers(plugin, store, monkeypatch, tmp_path):
    serial = [o.measurement.values for o in run_tasks(plan([plugin], Options(jobs=1)), Options(jobs=1))]
    monkeypatch.setenv("SAIGEN_HOME", str(tmp_path / "other"))
    parallel = [o.measurement.values for o in run_tasks(plan([plugin], Options(jobs=2)), Options(jobs=2))]
    assert serial == parallel


def test_what_is_fresh_is_not_run_again(plugin, store):
    options = Options(jobs=1)
    assert not any(o.reused for o in run_tasks(plan([plugin], options), options))
    assert all(o.reused for o in run_tasks(plan([plugin], options), options))


def test_changed_code_is_run_again(plugin, store, monkeypatch):
    options = Options(jobs=1)
    run_tasks(plan([plugin], options), options)
    monkeypatch.setattr(evidence, "code_digest", lambda paper: "0" * 64)
    assert not any(o.reused for o in run_tasks(plan([plugin], options), options))


def test_a_truncated_measurement_is_run_again(plugin, store):
    options = Options(jobs=1)
    task = plan([plugin], options)[0]
    run_tasks([task], options)
    whole = task.path.read_bytes()
    task.path.write_bytes(whole[: len(whole) // 2])
    outcome = run_tasks([task], options)[0]
    assert not outcome.reused
    assert outcome.measurement.values == json.loads(whole)["values"]


def whole_files(store):
    """The measurements that stand at their place; one that is being written lies in a folder of its own beside it.

    Such a folder may be gone before it is looked into: ``os.walk`` bears that, ``rglob`` does not.
    """
    found = []
    for folder, _, names in os.walk(store):
        if not folder.endswith(".partial"):
            found += [Path(folder) / name for name in names if name.endswith(".json")]
    return found


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_sigkill_keeps_what_was_finished_and_the_rest_is_as_in_an_unbroken_run(plugin, store, tmp_path, finished):
    broken = subprocess.Popen(
        [sys.executable, "-m", "saigen", "run", SLUG, "--jobs", "2"],
        env=os.environ | {"HELLO_SECONDS": "0.5"}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 150
    while len(whole_files(store)) < finished and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    kept = {path: path.read_bytes() for path in whole_files(store)}
    resumed = command("run", SLUG, "--jobs", "2", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
    unbroken = command("run", SLUG, "--json", SAIGEN_HOME=str(tmp_path / "unbroken"))
    assert numbers(resumed.stdout) == numbers(unbroken.stdout)


def test_ctrl_c_says_that_nothing_is_lost(plugin, store):
    running = subprocess.Popen(
        [sys.executable, "-m", "saigen", "run", SLUG, "--jobs", "1"],
        # A test run started in the background has SIGINT ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"HELLO_SECONDS": "1.5"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 150
    while not whole_files(store) and time.time() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "the same command goes on" in err and "Traceback" not in err
    assert whole_files(store)


def test_a_claim_that_raises_is_recorded_and_the_rest_go_on(plugin, store):
    done = command("run", SLUG, "--json", HELLO_FAIL="2")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [entry["seed"] for entry in document["failed"]] == [2]
    assert "told to fail" in document["failed"][0]["log"]
    assert list(store.rglob("*.failed.txt"))
    assert command("run", SLUG).returncode == 0
    assert not list(store.rglob("*.failed.txt"))


@pytest.fixture(params=["local", "torchrun", "cluster"])
def backend(request, monkeypatch):
    """The options of each way a trial's outcome comes back, with nothing of a cluster but its protocol."""
    if request.param == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    if request.param != "cluster":
        return Options(jobs=1, seeds=1)
    import joblib

    configured = joblib.parallel_config
    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(get_client=lambda: None))
    monkeypatch.setattr(joblib, "parallel_config", lambda backend: configured(backend="sequential"))
    return Options(jobs=1, seeds=1, backend="dask")


def test_a_success_clears_the_log_of_an_older_failure(plugin, store, monkeypatch, backend):
    task = plan([plugin], backend)[0]
    monkeypatch.setenv("HELLO_FAIL", "0")
    assert run_tasks([task], backend)[0].failed
    assert "told to fail" in evidence.Store().failure_path(task.path).read_text()
    task.scratch.mkdir()
    monkeypatch.delenv("HELLO_FAIL")
    assert not run_tasks([task], backend)[0].failed
    assert [path.name for path in task.path.parent.iterdir()] == [task.path.name]


@pytest.fixture
def study(tmp_path):
    """A folder in the layout of the study of label errors, with one wrong label a set that people confirmed."""
    folder = tmp_path / "study"
    folder.mkdir()
    labels = np.arange(60) % 3
    sure = np.full((60, 3), 0.05)
    sure[np.arange(60), np.where(np.arange(60) == 7, 2, labels)] = 0.9
    for name in ("mnist", "cifar10", "20news"):
        np.save(folder / f"{name}_labels.npy", labels)
        np.save(folder / f"{name}_pred_probs.npy", sure)
        (folder / f"{name}_people.json").write_text('[{"id": 7, "mturk": {"given": 0}}]')
    return folder


def test_claims_that_the_data_do_not_suit_are_left_out(store, study):
    done = command("run", "confident_learning", "--scale", "real", "--data", str(study), "--seeds", "2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [result["claim"] for result in document["results"]] == ["finds_what_people_confirmed"]
    assert document["results"][0]["measurements"][0]["values"]["found_prune_by_noise_rate"] == 1
    assert document["failed"] == []
    assert len(document["does_not_apply"]) == 4
    assert all("has no class folders" in entry["reason"] for entry in document["does_not_apply"])
    assert done.stderr.count("does not apply to this data") == 4
    assert not list(store.rglob("*.failed.txt"))


@pytest.mark.parametrize("data", [True, False])
def test_where_no_claim_applies_it_is_one_sentence_and_exit_code_2(store, tmp_path, data):
    (tmp_path / "empty").mkdir()
    given = ["--data", str(tmp_path / "empty")] if data else []
    done = command("run", "confident_learning", "--scale", "real", "--seeds", "1", "--json", *given)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and not list(store.rglob("*.failed.txt"))
    said = done.stderr.strip().splitlines()[-1]
    assert ("suits none of the claims" if data else "give --data PATH") in said
    assert len(json.loads(done.stdout)["does_not_apply"]) == 5


@pytest.mark.parametrize(
    ("when", "unfit"),
    [("before", True), ("between", True), ("too few", True), ("after", False), ("never", False), ("some", False)],
)
def test_an_error_is_the_datas_only_between_asking_for_them_and_using_them(
    plugin, store, tmp_path, monkeypatch, when, unfit
):
    def claim(trial):
        if when == "never":
            raise ValueError("a bug of the claim's own")
        if trial.data_path is None or when == "before" or (when == "some" and trial.seed == 1):
            raise ValueError("not such data")
        trial.used("data/train", "f")
        if when == "between":
            trial.data("images", size=8, part="test")
        if when == "too few":
            split(20, (4000, 1000), trial.rng("split"))
        if when != "some":
            raise ValueError("a bug of the claim's own")
        return {"shrinks": 4.0, "single": 1.0, "mean": 0.25}

    monkeypatch.setattr(plugin.module("claims"), "averaging_shrinks_noise", claim)
    options = Options(scale="real", jobs=1, data=tmp_path, seeds=2)
    outcomes = run_tasks(plan([plugin], options), options)
    results = runner.results_of([plugin], outcomes)
    if unfit:
        assert not any(outcome.failed for outcome in outcomes) and results[0].verdict == "not run"
        with pytest.raises(ValueError, match="suits none of the claims asked for"):
            runner.run("mean_of_noise", scale="real", data=tmp_path, jobs=1)
    else:
        assert outcomes[1].failed and outcomes[1].unfit is None and results[0].unfit is None
        assert evidence.Store().failure_path(outcomes[1].task.path).is_file()


def test_a_value_that_is_not_finite_counts_as_the_worst(plugin, store):
    done = command("run", SLUG, "--json", HELLO_NAN="2")
    assert done.returncode == 1
    assert json.loads(done.stdout)["results"][0]["verdict"] == "not reproduced"


def test_strict_wants_everything_reproduced(plugin, store):
    assert command("run", SLUG, "--strict").returncode == 0
    assert command("run", SLUG, "--strict", "--seeds", "2").returncode == 1


def test_one_document_on_stdout_and_the_same_one_every_time(plugin, store):
    first, second = command("run", SLUG, "--json"), command("run", SLUG, "--json", "--jobs", "1")
    assert json.loads(first.stdout)["results"][0]["paper"] == SLUG
    assert first.stdout == second.stdout
    assert "trials to run" in first.stderr


def test_torchrun_with_two_processes(plugin, store):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617",
         "-m", "saigen", "run", SLUG, "--scale", "tiny", "--seeds", "2", "--json"],
        capture_output=True, text=True, timeout=180, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [seed for seed, _ in numbers(done.stdout)] == [0, 1]


def test_settle_looks_once_more(plugin, store, monkeypatch):
    done = command("run", SLUG, "--settle", "--json")
    assert done.returncode == 0
    assert len(numbers(done.stdout)) >= 5


@pytest.mark.parametrize("jobs", [1, 2])
def test_json_is_one_document_whatever_the_experiments_print(plugin, store, jobs):
    done = command("run", SLUG, "--json", "--jobs", str(jobs), HELLO_SAYS="hello from within")
    assert done.returncode == 0
    assert len(numbers(done.stdout)) == 5 and "hello" not in done.stdout
    assert done.stderr.count("hello from within") == 10


def test_ray_gives_the_evidence_of_a_local_run(plugin, store, tmp_path):
    from tests.peers import need

    need("ray")
    local = command("run", SLUG, "--json")
    spread = command(
        "run",
        SLUG,
        "--json",
        "--backend",
        "ray",
        "--jobs",
        "2",
        SAIGEN_HOME=str(tmp_path / "ray"),
        RAY_USAGE_STATS_ENABLED="0",
    )
    assert spread.returncode == 0, spread.stderr
    assert numbers(spread.stdout) == numbers(local.stdout)


@pytest.mark.parametrize("looks", [True, False])
def test_data_that_a_claim_does_not_look_at_are_noted(plugin, store, tmp_path, monkeypatch, looks):
    def claim(trial):
        if looks:
            assert trial.data_path == tmp_path
        return {"shrinks": 4.0, "single": 1.0, "mean": 0.25}

    monkeypatch.setattr(plugin.module("claims"), "averaging_shrinks_noise", claim)
    options = Options(scale="real", jobs=1, data=tmp_path, seeds=1)
    (outcome,) = run_tasks(plan([plugin], options), options)
    assert outcome.measurement is not None and outcome.ignored_data is not looks
