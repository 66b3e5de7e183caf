"""The same networks in plain jax.numpy, in a process of their own.

This file imports nothing from the others, because jax has an environment without torch.
The weights, the running statistics and the batch come in a ``.npz`` file. The process
answers each line of JSON on standard input with one line on standard output::

    python bench/jax_rows.py "small CNN" batch.npz rows 1.0 cpu fp32 1
    {"number": 3}            ->  {"seconds": 0.041, "peak": 12345678}
    {"save": "answer.npz"}   ->  the same, and the answer in a file
"""

from __future__ import annotations

import json
import os
import sys
import time

# As many threads as torch has, and memory of a GPU only when it is used, because torch
# uses the same GPU. This is set before jax starts.
THREADS = sys.argv[-1]
SEVERAL = str(THREADS != "1").lower()
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_cpu_multi_thread_eigen={SEVERAL} intra_op_parallelism_threads={THREADS}",
)
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy  # noqa: E402
from jax import lax  # noqa: E402

EPS = 1e-5


def conv(p, name, x, stride=1, padding=0):
    dims = x.ndim - 2
    y = lax.conv_general_dilated(
        *(x, p[f"{name}.weight"], (stride,) * dims, [(padding, padding)] * dims),
        dimension_numbers=(
            ("NCHW", "OIHW", "NCHW") if dims == 2 else ("NCH", "OIH", "NCH")
        ),
    )
    bias = p.get(f"{name}.bias")
    return y if bias is None else y + bias.reshape((-1,) + (1,) * dims)


def batch_norm(p, name, x):
    """Batch norm with running statistics."""
    scale = p[f"{name}.weight"] * lax.rsqrt(p[f"{name}.running_var"] + EPS)
    shift = p[f"{name}.bias"] - p[f"{name}.running_mean"] * scale
    shape = (-1,) + (1,) * (x.ndim - 2)
    return x * scale.reshape(shape) + shift.reshape(shape)


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def max_pool(x):
    window = (1, 1, 2, 2)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def mlp(p, x):
    x = jax.nn.relu(batch_norm(p, "1", linear(p, "0", x)))
    x = jax.nn.relu(batch_norm(p, "4", linear(p, "3", x)))
    return linear(p, "6", x)


def small_cnn(p, x):
    x = max_pool(jax.nn.relu(batch_norm(p, "1", conv(p, "0", x, padding=1))))
    x = max_pool(jax.nn.relu(batch_norm(p, "5", conv(p, "4", x, padding=1))))
    x = jax.nn.relu(batch_norm(p, "9", conv(p, "8", x, padding=1)))
    return linear(p, "13", x.mean((2, 3)))


def conv1d_net(p, x):
    x = jax.nn.relu(batch_norm(p, "1", conv(p, "0", x, 2, 3)))
    x = jax.nn.relu(batch_norm(p, "4", conv(p, "3", x, 2, 2)))
    x = jax.nn.relu(batch_norm(p, "7", conv(p, "6", x, 2, 1)))
    return linear(p, "11", x.mean(2))


def resnet18(p, x):
    x = jax.nn.relu(batch_norm(p, "1", conv(p, "0", x, padding=1)))
    for i in range(8):
        name, stride = str(3 + i), 2 if i in (2, 4, 6) else 1
        y = conv(p, f"{name}.body.0", x, stride, 1)
        y = jax.nn.relu(batch_norm(p, f"{name}.body.1", y))
        y = batch_norm(p, f"{name}.body.4", conv(p, f"{name}.body.3", y, padding=1))
        if stride > 1:
            x = conv(p, f"{name}.short.0", x, stride)
            x = batch_norm(p, f"{name}.short.1", x)
        x = jax.nn.relu(x + y)
    return linear(p, "13", x.mean((2, 3)))


NETWORKS = {
    "BN MLP": mlp,
    "small CNN": small_cnn,
    "conv1d net": conv1d_net,
    "ResNet-18": resnet18,
}


def functions(net, buffers, bound):
    """{task: function of (params, x, y)}."""

    def loss(params, x, y):
        log = jax.nn.log_softmax(net({**params, **buffers}, x))
        return -jnp.take_along_axis(log, y[:, None], 1).sum()

    def rows(params, x, y):
        one = jax.grad(lambda p, x, y: loss(p, x[None], y[None]))
        return jax.vmap(one, (None, 0, 0))(params, x, y)

    def norms(params, x, y):
        return norms_of(rows(params, x, y))

    def norms_of(rows):
        squares = [jnp.square(g).reshape(len(g), -1).sum(1) for g in rows.values()]
        return jnp.sqrt(sum(squares))

    def clipped_sum(params, x, y):
        gradients = rows(params, x, y)
        factors = jnp.minimum(bound / norms_of(gradients), 1.0)
        return {n: jnp.tensordot(factors, g, 1) for n, g in gradients.items()}

    return {
        "plain": jax.grad(loss),
        "rows": rows,
        "norms": norms,
        "clipped sum": clipped_sum,
    }


def serve(net, path, task, bound, device, precision, threads):
    given = dict(numpy.load(path))
    jax.config.update("jax_enable_x64", given["x"].dtype == numpy.float64)
    jax.config.update(
        "jax_default_matmul_precision",
        "tensorfloat32" if precision == "tf32" else "highest",
    )
    put = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    x = jax.device_put(given.pop("x"), put)
    y = jax.device_put(given.pop("y").astype(numpy.int32), put)
    state = {n.removeprefix("net/"): jax.device_put(t, put) for n, t in given.items()}
    buffers = {n: t for n, t in state.items() if "running_" in n}
    params = {n: t for n, t in state.items() if n not in buffers and t.dtype == x.dtype}
    function = functions(NETWORKS[net], buffers, float(bound))[task]
    compiled = jax.jit(function).lower(params, x, y).compile()
    memory = compiled.memory_analysis()  # XLA's own count
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    # The clock of measuring.py: calls follow each other, and the last is waited for.
    alone = device == "cpu" and threads == "1"
    now = time.process_time if alone else time.perf_counter
    jax.block_until_ready(compiled(params, x, y))
    tell({"ready": jax.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        number = asked.get("number", 1)
        started = now()
        for _ in range(number):
            answer = compiled(params, x, y)
        jax.block_until_ready(answer)
        seconds = (now() - started) / number
        if "save" in asked:
            named = answer if isinstance(answer, dict) else {"": answer}
            numpy.savez(
                asked["save"], **{n: numpy.asarray(t) for n, t in named.items()}
            )
        del answer
        tell({"seconds": seconds, "peak": peak})


def tell(what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    try:
        serve(*sys.argv[1:])
    except Exception as error:  # the other process reports it
        lines = str(error).splitlines() or [""]
        tell({"refused": f"{type(error).__name__}: {lines[0]}"})
