"""`icegrt doctor`: every finding says what to do, failures decide the exit status, and nothing broken breaks it."""

import importlib
import json
import sys
import types
from importlib import metadata

import pytest

from icegrt import cli
from icegrt.commands import doctor
from icegrt.commands.doctor import FAIL, NOTE, OK, Check, Package


@pytest.fixture
def selftest(monkeypatch):
    """Sets what the forward pass does."""

    def put(function):
        module = types.ModuleType("icegrt.model.selftest")
        module.run = function
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.fixture
def versions(monkeypatch):
    """Sets the installed versions of packages."""

    def put(**installed):
        def version(name):
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(doctor.metadata, "version", version)

    return put


def test_a_machine_where_all_is_well_exits_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("a", "fine"), Check("b", "slow", NOTE, "buy")])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "check  status  found  what to do\na      ok      fine\nb      note    slow   buy\n\nthe engine can run here\n"
    )


def test_a_failure_exits_1_with_its_reason_and_advice(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("a", "fine"), Check("b", "broken", FAIL, "mend")])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("the engine cannot run here:\n  b: broken; mend\n")


def test_json_holds_the_same_findings_and_nothing_that_libraries_print(monkeypatch, capsys):
    def examine():
        print("chatter")
        return [Check("a", "broken", FAIL, "mend")]

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "ok": False,
        "checks": [{"name": "a", "found": "broken", "status": "FAIL", "advice": "mend"}],
    }


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.11.0", OK),
        ("2.13.0+cpu", OK),
        ("2.11", OK),
        ("2.10.9", FAIL),
        ("3.0.0", FAIL),
        ("3.0.0rc1", FAIL),
        ("2", FAIL),
    ],
)
def test_versions_outside_the_tested_range_fail(versions, version, status):
    versions(torch=version)
    check = doctor.package(Package("torch", (2, 11), (3,), advice="upgrade"))
    assert check.status == status
    assert (check.advice == "supported: >= 2.11, < 3; upgrade") == (status == FAIL)


def test_a_missing_package_fails_only_where_it_is_required(versions):
    versions()
    assert doctor.package(Package("megatron-core")) == Check(
        "megatron-core", "not installed", FAIL, "pip install 'icegrt[engine]'"
    )
    optional = doctor.package(Package("flash-attn", required=False, without="SDPA", advice="install it"))
    assert optional == Check("flash-attn", "not installed: SDPA", NOTE, "install it")


def test_every_package_that_can_be_missing_comes_with_advice(versions):
    versions()
    assert all(doctor.package(package).advice for package in doctor.PACKAGES)


def test_the_forward_pass_is_the_models_own_selftest(selftest):
    selftest(lambda: "2 layers, loss 5.5")
    check = doctor.forward_pass()
    assert check.status == OK and check.found.startswith("2 layers, loss 5.5 (")


def test_a_forward_pass_that_raises_is_a_finding(selftest):
    def broken():
        raise ValueError("first\nsecond")

    selftest(broken)
    check = doctor.forward_pass()
    assert (check.status, check.found) == (FAIL, "ValueError: first") and check.advice


def test_a_forward_pass_that_cannot_be_tried_fails_by_its_cause(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'megatron'", name="megatron")

    monkeypatch.setattr(doctor.importlib, "import_module", absent)
    check = doctor.forward_pass()
    assert (check.status, check.found) == (FAIL, "needs megatron, which is not installed")


@pytest.mark.parametrize(
    ("error", "finding"),
    [
        (ModuleNotFoundError("No module named 'icegrt._C'"), "not built"),
        (ImportError("undefined symbol: x\nmore"), "does not load: undefined symbol: x"),
    ],
)
def test_an_extension_that_is_missing_or_broken_fails_with_how_to_build_it(monkeypatch, error, finding):
    def broken(name):
        raise error

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    check = doctor.extension()
    assert (check.status, check.found) == (FAIL, finding) and "make install" in check.advice


def test_kernels_are_listed_by_the_backend_that_they_take(monkeypatch):
    dispatch = types.ModuleType("icegrt.kernels.dispatch")
    dispatch.describe = lambda device: {"a": "triton", "b": "reference", "c": "triton"}
    real = importlib.import_module
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: dispatch if name == dispatch.__name__ else real(name)
    )
    assert list(doctor.kernels()) == [Check("kernels: triton", "a, c"), Check("kernels: reference", "b")]


def test_a_check_that_raises_is_a_finding():
    def raises(error):
        raise error

    missing = doctor.run_check("devices", lambda: raises(ImportError("no torch")), "reinstall")
    assert missing == [Check("devices", "not checked: no torch", NOTE, "see the packages above")]
    broken = doctor.run_check("devices", lambda: raises(OSError("libcuda.so\nmore")), "reinstall")
    assert broken == [Check("devices", "libcuda.so", FAIL, "reinstall")]


def test_devices_are_named_with_capability_and_memory(monkeypatch):
    torch = pytest.importorskip("torch")
    cards = [
        types.SimpleNamespace(name="Card A", major=9, minor=0, total_memory=80 * 2**30),
        types.SimpleNamespace(name="Card B", major=7, minor=5, total_memory=16 * 2**30),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    new, old = doctor.devices()
    assert new.found.startswith("Card A, sm_90, 80 GiB, CUDA") and new.status == OK
    assert old.found.startswith("Card B, sm_75, 16 GiB") and old.status == NOTE and "sm_80" in old.advice


def test_this_machine_can_be_examined(selftest):
    selftest(lambda: "well")
    checks = doctor.examine()
    names = [check.name for check in checks]
    assert names[:4] == ["Python", "platform", "CPU", "memory"] and names[-1] == "forward pass"
    assert {p.name for p in doctor.PACKAGES} <= set(names) and "distributed" in names and "icegrt._C" in names
    assert all(check.found and check.status in (OK, NOTE, FAIL) for check in checks)
    assert all(check.advice for check in checks if check.status == FAIL)
