"""How much faster is a whole run as one compiled function than a loop on the host?

``python -m benchmarks.loops``: the same updates of a small network on digits, by
``scan_fit``, by ``fit`` and by a bare loop over the compiled step.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.common import interleave, parser_of, report
from jaxtransfer import data, model, nets, parallel, prng, train
from jaxtransfer.methods import finetune

STEPS, BATCH = 300, 64


def main() -> None:
    """Measure and report."""
    options = parser_of(__doc__).parse_args()
    arrays = jax.tree.map(jnp.asarray, data.as_arrays(data.load("digits", "train")))
    net = model.from_linen(nets.MLP(10, widths=(64, 64)))
    optimizer = optax.adam(1e-3)
    step = train.train_step(finetune.objective(net), optimizer)
    start = net.init(jax.random.key(0), arrays["inputs"][:1])
    compiled = parallel.jit_step(step)
    scanned = jax.jit(
        lambda state, arrays: train.scan_fit(
            step, state, train.resident(arrays, BATCH), steps=STEPS
        )[0]
    )
    draw = jax.jit(lambda key, n, arrays: train.resident(arrays, BATCH)(key, n))

    def fresh() -> train.TrainState:
        return train.init_state(jax.random.key(1), start, optimizer)

    def batches():
        key = prng.stream(jax.random.key(1), "data")
        return (draw(key, jnp.asarray(n), arrays) for n in range(STEPS))

    def bare():
        state = fresh()
        for batch in batches():
            state, _ = compiled(state, batch)
        return state.params

    results = {
        "host loop (fit)": lambda: (
            train.fit(compiled, fresh(), batches(), steps=STEPS, progress=False)[
                0
            ].params
        ),
        "bare loop over the step": bare,
        "scan_fit": lambda: scanned(fresh(), arrays).params,
    }
    params = [run() for run in results.values()]
    apart = max(
        float(jnp.abs(a - b).max())
        for other in params[1:]
        for a, b in zip(jax.tree.leaves(params[0]), jax.tree.leaves(other), strict=True)
    )
    report(
        f"{STEPS} updates of an MLP 64-64 on digits, batch {BATCH}",
        interleave(results, rounds=9),
        largest_difference_of_parameters=apart,
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
