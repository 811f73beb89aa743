from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.core.callables import locate
from pipeline.steps.keys import Code


def test_a_module_is_found_without_running_it(own_modules: Path) -> None:
    place = locate("my_package.inner.deep:make")
    assert place.folder == own_modules
    assert not [name for name in sys.modules if name.startswith("my_")]
    hashes = Code(place.folder, own=place.packages).hashes([place.module])
    assert list(hashes) == [
        "my_package/__init__.py",
        "my_package/inner/__init__.py",
        "my_package/inner/deep.py",
        "my_package/layers.py",
    ]


def test_what_the_module_imports_beside_it_is_part_of_its_code(own_modules: Path) -> None:
    place = locate("my_nets:make")
    before = Code(place.folder, own=place.packages).hashes([place.module])
    assert list(before) == ["my_layers.py", "my_nets.py"]
    layers = own_modules / "my_layers.py"
    layers.write_text(f"{layers.read_text()}\n# another\n")
    after = Code(place.folder, own=place.packages).hashes([place.module])
    assert [name for name in before if before[name] != after[name]] == ["my_layers.py"]


def test_an_installed_package_stands_for_itself_alone() -> None:
    place = locate("timm.models.resnet:resnet18")
    assert place.packages == ("timm",)


def test_locating_loads_no_framework(own_modules: Path) -> None:
    code = (
        "import sys; from pipeline.core.callables import locate;"
        "locate('my_nets:make'); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(root)},
    )
    assert told.stdout.strip() == "False"


def test_a_file_of_a_librarys_name_does_not_stand_for_it(own_modules: Path) -> None:
    (own_modules / "json.py").write_text("raise RuntimeError('the wrong one')")
    assert locate("json:loads").folder != own_modules
