"""Arrays [.., T, T] in the compiled score and update of a topology: scores_in_memory.py NAME T."""

import sys
from functools import partial

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.ppo import ppo
from jaxrlhf.config import DecoderConfig, MeshConfig, OptimConfig, PPOConfig
from jaxrlhf.core.types import Batch, TrainState
from jaxrlhf.mesh.sharding import row_layout, shardings, train_state_shardings, with_layout
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import make_optimizer, make_update, policy_loss
from jaxrlhf.study.plan import hlo
from jaxrlhf.study.plan.compiled import mesh_of
from jaxrlhf.study.plan.topology import parse


def main(name: str, length: int) -> None:
    mesh = mesh_of(MeshConfig(data=1, fsdp=4, tensor=2), parse(name, gpus=True))
    shape = {"vocab": 1024, "embed": 256, "heads": 4, "kv_heads": 2, "head_dim": 128, "mlp": 512}
    model = Model(DecoderConfig(layers=2, context=length, **shape), "bfloat16", remat="full")
    layout = shardings(model.axes(), mesh)
    tx = make_optimizer(OptimConfig())
    whole = train_state_shardings(tx, model.shapes(), layout, mesh)

    def start() -> TrainState:
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes())
        return TrainState.create(params, tx)

    def rows(dtype: type = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((8, length), dtype, sharding=row_layout(mesh))

    numbers = ("mask_BT", "old_logp_BT", "advantage_BT", "weight_BT")
    batch = Batch(rows(), rows(), **{name: rows(jnp.float32) for name in numbers})
    with jax.set_mesh(mesh):
        state = with_layout(jax.eval_shape(start), whole)
        params = with_layout(model.shapes(), layout)
        loss = policy_loss(model, ppo(PPOConfig()))
        update = make_update(tx, loss, layout=whole, packed=8, model=model)
        programs = {
            "score": jax.jit(partial(score, model)).lower(params, rows(), rows()),
            "update": update.lower(state, batch),
        }
        for step, program in programs.items():
            module = hlo.parse(program.compile().as_text())
            found = {
                str(shape)
                for instructions in module.computations.values()
                for op in instructions.values()
                for shape in op.shapes
                if shape.dims.count(length) > 1
            }
            print(step, sorted(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
