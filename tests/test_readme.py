"""What the README shows runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "trained 650 of 2,762 numbers" in capsys.readouterr().out
    assert jnp.isfinite(names["value"])
    assert int(names["state"].step) == 1
    assert sorted(names["state"].params) == ["student"]
    assert jax.tree.all(
        jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), names["gradient"])
    )


def test_every_module_the_readme_names_exists():
    root = README.parent
    for name in re.findall(r"`experiments\.(\w+)`", README.read_text()):
        assert (root / "experiments" / f"{name}.py").exists(), name
