"""What the README shows runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments import few_shot_saved
from experiments.few_shot_recipes import network

README = Path(__file__).parent.parent / "README.md"


def own_task(folder):
    """What the block on a task of one's own names: a network, and two drawn classes."""
    few_shot_saved.save(
        folder / "networks/ProtoNet",
        method="ProtoNet",
        filters=4,
        image_size=8,
        ways=2,
        shots=1,
        rate=0.4,
        steps=1,
        statistics="support",
        variables=network(2, 4).init(jax.random.key(0), jnp.ones((1, 8, 8, 1))),
        invert=True,
    )
    for name, place in (("bar", np.s_[8:12, :]), ("post", np.s_[:, 8:12])):
        pixels = np.full((20, 20), 255, np.uint8)
        pixels[place] = 0
        for path in (f"support/{name}/0.png", f"query/{name}.png"):
            file = folder / "my_task" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def test_python_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    own_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "trained 650 of 2,762 numbers" in printed
    assert "['bar', 'post']" in printed
    assert jnp.isfinite(names["value"])
    assert int(names["state"].step) == 1
    assert sorted(names["state"].params) == ["bridges", "student"]
    assert "fresh 2, unused 2, missing 0" in printed
    assert jax.tree.all(
        jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), names["gradient"])
    )


def test_every_module_the_readme_names_exists():
    root = README.parent
    for name in re.findall(r"`experiments\.(\w+)`", README.read_text()):
        assert (root / "experiments" / f"{name}.py").exists(), name
