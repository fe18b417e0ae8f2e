"""The root of the repository is the package: these hold the traps of that layout shut."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import petals
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "libp2p", "trio", "numpy")
WHEEL = os.environ.get("PETALS_TEST_WHEEL")

needs_wheel = pytest.mark.skipif(WHEEL is None, reason="scripts/test builds the wheel")


def imported_by(code: str) -> set[str]:
    """The top-level modules that are loaded after ``code`` has run in a fresh interpreter."""
    tell = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\n{tell}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_one_identity() -> None:
    from petals.protocol import errors, span

    assert vars(errors)["Span"] is span.Span
    folder = Path(petals.__file__).resolve().parent
    doubles = {
        name
        for name, module in sys.modules.items()
        if (file := getattr(module, "__file__", None))
        and Path(file).is_absolute()  # torch makes up names for modules without a file
        and Path(file).resolve().is_relative_to(folder)
        and Path(file).resolve().relative_to(folder).parts[0] not in ("tests", "scripts")
        and name.split(".")[0] != "petals"
    }
    assert not doubles


@needs_wheel
def test_the_installed_wheel_is_what_is_tested() -> None:
    folder = Path(petals.__file__).parent
    assert folder.parent.name == "site-packages"
    assert not folder.is_symlink()


@pytest.mark.parametrize("module", ["petals", "petals.protocol", "petals.node", "petals.inference"])
def test_importing_a_folder_costs_nothing(module: str) -> None:
    assert not imported_by(f"import {module}") & set(HEAVY)


def test_the_whole_protocol_is_light() -> None:
    code = (
        "import importlib, pkgutil, petals.protocol\n"
        "for found in pkgutil.iter_modules(petals.protocol.__path__):\n"
        "    importlib.import_module('petals.protocol.' + found.name)"
    )
    assert not imported_by(code) & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["rum"]])
def test_the_command_line_answers_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "from petals.node.cli.app import run_command_line\n"
        f"run_command_line({arguments!r})\n"
        "print()"
    )
    assert not imported_by(code) & set(HEAVY)


def test_every_name_of_the_face_is_there() -> None:
    for name in petals.__all__:
        assert getattr(petals, name).__name__ == name
    assert set(petals.__all__) <= set(dir(petals))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nod'"):
        _ = petals.Nod


def test_version_is_that_of_the_distribution() -> None:
    assert petals.__version__ == importlib.metadata.version("petals-node")


def test_every_folder_of_code_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"petals", "petals.inference.demo_model"}  # the latter holds data only
    for top in ("inference", "node", "protocol"):
        for init in (ROOT / top).rglob("__init__.py"):
            folders.add(".".join(("petals", *init.parent.relative_to(ROOT).parts)))
    assert set(listed) == folders


def test_constraints_are_exact_and_within_what_the_package_allows() -> None:
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    for text in importlib.metadata.requires("petals-node") or []:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name != "petals-node":
            assert requirement.specifier.contains(pins[name]), name


@needs_wheel
def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    assert WHEEL is not None
    names = set(zipfile.ZipFile(WHEEL).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"petals"}
    inside = {name.split("/")[1] for name in names if name.startswith("petals/")}
    assert inside == {"__init__.py", "py.typed", "inference", "node", "protocol"}
    for top in ("inference", "node", "protocol"):
        for path in (ROOT / top).rglob("*.py"):
            assert f"petals/{path.relative_to(ROOT).as_posix()}" in names
    for data in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"petals/inference/demo_model/{data}" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
