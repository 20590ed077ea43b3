"""Every way to install vlmfast, what it imports, and what the extension is linked against."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "vlmfast" / "_C.abi3.so"
# Neither the environment nor anything that was built in the checkout may reach the copy.
NOT_SOURCE = (".*", "build", "dist", "out", "__pycache__", "*.egg-info", "*.so")
OPTIONAL_PACKAGES = (
    "einops",
    "flamingo_pytorch",
    "hypothesis",
    "matplotlib",
    "numpy",
    "open_clip",
    "pytest",
    "timm",
    "torchvision",
    "transformers",
    "triton",
    "xformers",
)
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")

# Runs the C++ kernel and finds the Triton one, and says where they came from.
PROBE = """
    import importlib.util, json
    import torch, vlmfast, vlmfast.functional as VF
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    ours = VF.scaled_dot_product_attention(query, key, value, backend="cpu")
    torch.testing.assert_close(
        ours, torch.nn.functional.scaled_dot_product_attention(query, key, value)
    )
    kernel = importlib.util.find_spec("vlmfast.kernels.flash_attention.forward")
    print(json.dumps([vlmfast.__file__, kernel.origin, vlmfast.__version__]))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command that must succeed and returns what it printed."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_python(code: str, *, cwd: Path, python: str | Path = sys.executable, **environment: str):
    """Runs code in a new interpreter and returns the JSON in its last line."""
    output = run(python, "-c", textwrap.dedent(code), cwd=cwd, **environment)
    return json.loads(output.splitlines()[-1])


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    Path(purelib.strip(), "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def fast_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that does not optimise: what is tested is the build, not what comes out of it."""
    script = tmp_path_factory.mktemp("bin") / "c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("checkout") / "vlmfast"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


@pytest.fixture(scope="module")
def unpacked(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, checkout),
        cwd=folder,
    )
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked: Path, fast_compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", folder, unpacked)
    run(*command, cwd=folder, CXX=fast_compiler)
    (path,) = folder.glob("*.whl")
    return path


def sources(*patterns: str) -> set[str]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {str(path.relative_to(ROOT)) for path in paths}


def test_sdist_can_build_test_and_measure(unpacked: Path) -> None:
    expected = sources("csrc/**/*.*", "kernels/**/*.py", "vlmfast/**/*.py", "bench/**/*.py")
    expected |= sources("tests/**/*.py", "tests/data/*", "tests/snapshots/*")
    expected |= {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"}
    shipped = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    assert expected - shipped == set()
    assert not any(name.endswith((".so", ".pyc")) for name in shipped)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = sources("vlmfast/**/*.py") | {"vlmfast/_C.abi3.so", "vlmfast/py.typed"}
    expected |= {f"vlmfast/{name}" for name in sources("kernels/**/*.py")}
    assert names == expected


def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    run(python, *PIP, "install", *OFFLINE, wheel, cwd=tmp_path)
    package, kernel, version = run_python(PROBE, cwd=tmp_path, python=python)
    assert Path(package).is_relative_to(tmp_path / "env")
    assert Path(kernel) == Path(package).parent / "kernels" / "flash_attention" / "forward.py"
    assert wheel.name.startswith(f"vlmfast-{version}-")


@pytest.mark.usefixtures("wheel")  # leaves its object files behind
def test_pip_install_works(unpacked: Path, fast_compiler: str, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = (sys.executable, *PIP, "install", *OFFLINE, "--target", target, ".")
    run(*command, cwd=unpacked, CXX=fast_compiler)
    package, kernel, _ = run_python(PROBE, cwd=tmp_path, PYTHONPATH=str(target))
    assert Path(package) == target / "vlmfast" / "__init__.py"
    assert Path(kernel) == target / "vlmfast" / "kernels" / "flash_attention" / "forward.py"


def test_editable_install_works(checkout: Path, fast_compiler: str, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    run(python, *PIP, "install", *OFFLINE, "--editable", ".", cwd=checkout, CXX=fast_compiler)
    package, kernel, _ = run_python(PROBE, cwd=tmp_path, python=python)
    assert Path(package) == checkout / "vlmfast" / "__init__.py"
    assert Path(kernel) == checkout / "kernels" / "flash_attention" / "forward.py"


def test_uninstalled_use_from_the_root() -> None:
    package, kernel, _ = run_python(PROBE, cwd=ROOT)
    assert Path(package) == ROOT / "vlmfast" / "__init__.py"
    assert Path(kernel) == ROOT / "kernels" / "flash_attention" / "forward.py"


BLOCK = """
    import json, sys
    from importlib.abc import MetaPathFinder

    class Absent(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED or name in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    BLOCKED = BLOCKED_NAMES
    sys.meta_path.insert(0, Absent())
"""


def run_without(blocked: tuple[str, ...], code: str):
    prologue = textwrap.dedent(BLOCK).replace("BLOCKED_NAMES", repr(blocked))
    return run_python(prologue + textwrap.dedent(code), cwd=ROOT, PYTHONWARNINGS="ignore")


def test_works_with_torch_alone() -> None:
    code = """
        import torch, vlmfast, vlmfast.functional as VF, vlmfast.nn
        x = torch.randn(1, 2, 5, 8)
        outs = [VF.scaled_dot_product_attention(x, x, x, backend=b) for b in ("cpu", "reference")]
        torch.testing.assert_close(*outs)
        print(json.dumps(True))
    """
    assert run_without(OPTIONAL_PACKAGES, code)


def test_works_without_the_extension() -> None:
    code = """
        import torch, vlmfast, vlmfast.functional as VF
        x = torch.randn(1, 2, 5, 8)
        torch.testing.assert_close(
            VF.scaled_dot_product_attention(x, x, x),
            torch.nn.functional.scaled_dot_product_attention(x, x, x),
        )
        try:
            VF.scaled_dot_product_attention(x, x, x, backend="cpu")
        except NotImplementedError as error:
            print(json.dumps(str(error)))
    """
    assert "_C" in run_without((*OPTIONAL_PACKAGES, "vlmfast._C"), code)


@pytest.mark.parametrize(
    ("baseline", "imported"),
    [("json", "vlmfast"), ("torch", "vlmfast.functional, vlmfast.nn, vlmfast.backends")],
)
def test_import_pulls_in_nothing_else(baseline: str, imported: str) -> None:
    code = f"""
        import json, sys
        import {baseline}
        before = {{name.split(".")[0] for name in sys.modules}}
        import {imported}
        print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}} - before)))
    """
    new = set(run_python(code, cwd=ROOT))
    assert new - sys.stdlib_module_names == {"vlmfast"}


def test_import_costs_at_most_30_percent_over_torch() -> None:
    """Both imports in one process and by its processor time, so that other load does not count."""
    code = """
        import json, time
        start = time.process_time()
        import torch
        torch_done = time.process_time()
        import vlmfast, vlmfast.functional
        ours_done = time.process_time()
        print(json.dumps([torch_done - start, ours_done - torch_done]))
    """
    runs = [run_python(code, cwd=ROOT) for _ in range(4)]  # the first one fills the file cache
    torch_cost = min(cost for cost, _ in runs)
    our_cost = min(cost for _, cost in runs)
    assert our_cost <= 0.3 * torch_cost


def test_transformers_does_not_take_our_kernels_folder_for_its_own() -> None:
    code = """
        import json, sys
        import torch, vlmfast
        from vlmfast._torchvision_ops import import_torchvision
        import_torchvision()
        from transformers import CLIPTextConfig, CLIPTextModel
        from transformers.utils import is_kernels_available
        sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=9, bos_token_id=0, eos_token_id=1))
        model(torch.tensor([[0, 3, 1]]))
        found = getattr(sys.modules.get("kernels"), "__file__", None)
        print(json.dumps([is_kernels_available(), found]))
    """
    available, found = run_python(code, cwd=ROOT)
    assert found is None or not Path(found).is_relative_to(ROOT)
    assert not available or found is not None
    assert not (ROOT / "kernels" / "__init__.py").exists()


def symbols(*options: str) -> list[list[str]]:
    """Rows of `nm`, each ending in kind and name, without symbol versions."""
    rows = run("nm", "--dynamic", *options, EXTENSION, cwd=ROOT).splitlines()
    return [row.partition("@")[0].split() for row in rows]


def test_extension_needs_only_stable_interfaces() -> None:
    needed = {row[-1] for row in symbols("--undefined-only")}
    cxx_of_torch = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert not [name for name in needed if name.startswith(cxx_of_torch)]
    assert not [name for name in needed if name.startswith(("Py", "_Py"))]
    assert any(name.startswith("aoti_torch_") for name in needed)


def test_extension_exports_nothing() -> None:
    """Weak symbols are inline code of headers, which C++ merges by design."""
    exported = {row[-1] for row in symbols("--defined-only") if row[-2] not in "WVuvw"}
    assert exported - {"__bss_start", "_edata", "_end", "_fini", "_init"} == set()
