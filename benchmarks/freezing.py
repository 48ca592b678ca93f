"""What does holding the backbone save, with clipping, decay and norms switched on?

``python -m benchmarks.freezing``: a step of CIFAR ResNet-20 with all parameters
trained, against the head alone, and against the usual mask in the optimizer, which
computes the backward pass of the backbone and throws it away.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.common import interleave, parser_of, report
from jaxtransfer import model, nets, parallel, train, tree
from jaxtransfer.methods import finetune

BATCH = 64


def main() -> None:
    """Measure and report."""
    options = parser_of(__doc__).parse_args()
    net = model.from_linen(nets.ResNet(10, depth=20))
    images = jax.random.normal(jax.random.key(0), (BATCH, 32, 32, 3))
    batch = {"inputs": images, "labels": jnp.arange(BATCH) % 10}
    variables = net.init(jax.random.key(1), images[:1])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    labels = tree.map_with_path(
        lambda path, _: "train" if path.startswith("linear") else "hold",
        variables.params,
    )
    masked = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"train": optax.adamw(1e-3), "hold": optax.set_to_zero()}, labels
        ),
    )
    cases = {"full": (".*", optimizer), "mask in the optimizer": (".*", masked)}
    cases["head only (partition)"] = ("linear", optimizer)
    runs, flops, memory = {}, {}, {}
    for name, (rules, transform) in cases.items():
        trained, frozen = finetune.split(variables, rules)
        state = train.init_state(jax.random.key(2), trained, transform, frozen=frozen)
        step = parallel.jit_step(
            train.train_step(finetune.objective(net), transform), donate=False
        )
        program = step.lower(state, batch).compile()
        flops[name] = program.cost_analysis()["flops"]
        memory[name] = program.memory_analysis().temp_size_in_bytes
        runs[name] = lambda step=step, state=state: step(state, batch)[0].params
    report(
        f"one step of ResNet-20 (CIFAR), batch {BATCH}, clipping, norm and decay on",
        interleave(runs, rounds=15),
        flops_relative_to_full={n: f / flops["full"] for n, f in flops.items()},
        memory_relative_to_full={n: m / memory["full"] for n, m in memory.items()},
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
