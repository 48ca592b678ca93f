"""How much cheaper are 8 seeds vmapped into one run than 8 runs?

``python -m benchmarks.seeds``: a small dense network on digits, trained by
``scan_fit``; compile time is left out of both.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.common import interleave, parser_of, report
from jaxtransfer import data, model, nets, train
from jaxtransfer.methods import finetune

SEEDS, STEPS, BATCH = 8, 300, 64


def main() -> None:
    """Measure and report."""
    options = parser_of(__doc__).parse_args()
    arrays = jax.tree.map(jnp.asarray, data.as_arrays(data.load("digits", "train")))
    net = model.from_linen(nets.MLP(10, widths=(64, 64)))
    optimizer = optax.adam(1e-3)
    step = train.train_step(finetune.objective(net), optimizer)

    def run(key, arrays):
        start = net.init(key, arrays["inputs"][:1])
        state = train.init_state(key, start, optimizer)
        sample = train.resident(arrays, BATCH)
        return train.scan_fit(step, state, sample, steps=STEPS)[0].params

    one, every = jax.jit(run), jax.jit(jax.vmap(run, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), SEEDS)
    report(
        f"{SEEDS} seeds of {STEPS} updates of an MLP 64-64 on digits, batch {BATCH}",
        interleave(
            {
                "one after the other": lambda: [one(key, arrays) for key in keys],
                "vmapped": lambda: every(keys, arrays),
            },
            rounds=9,
        ),
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
