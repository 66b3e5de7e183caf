"""Every rule in the table equals its slow form, in values and gradients."""

import dataclasses

import pytest
import torch
from measured import change_regimes, take_every_size
from operator_rules import take_any_memory
from torch import nn

import vmapsafe.rules
from vmapsafe._modes import MODES
from vmapsafe._rule import (
    FunctionRule,
    OperatorRule,
    operator_rules,
    registered,
    slice_by_slice,
)
from vmapsafe._torch import batched_levels
from vmapsafe.rules import convolution
from vmapsafe.testing import check_rule


class OnALayer:
    """A site as the rules see it: a covered layer runs, and holds these buffers."""

    layer = nn.BatchNorm2d(4)
    num_groups = 2
    buffers = []
    update_running_stats = False
    rows = "contribution"
    copies_at = None
    stays_in_eval = True
    process_group = None

    def merged_levels(self, tensor):
        return tuple(sorted(batched_levels((tensor,))))

    def path(self):
        return "'norm' (BatchNorm2d)"

    def holds(self, tensor):
        return True

    def leaves_out(self, tensor):
        return True


SEEDED = torch.Generator().manual_seed(1)


def randn(*shape):
    return torch.randn(*shape, generator=SEEDED, dtype=torch.float64)


def batch_norm(*shape, affine=True, **other):
    return {
        "input": randn(*shape),
        "running_mean": None,
        "running_var": None,
        "weight": randn(shape[1]) if affine else None,
        "bias": randn(shape[1]) if affine else None,
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        **other,
    }


def instance_norm(*shape, affine=True):
    case = batch_norm(*shape, affine=affine)
    case["use_input_stats"] = case.pop("training")
    case["running_mean"], case["running_var"] = randn(shape[1]), randn(shape[1])
    return case


def group_norm(*shape, groups, eps=1e-5):
    return {
        "input": randn(*shape),
        "num_groups": groups,
        "weight": randn(shape[1]),
        "bias": randn(shape[1]),
        "eps": eps,
    }


def running(case):
    channels = case["input"].shape[1]
    mean, var = randn(channels), randn(channels).square() + 0.5
    return {**case, "training": False, "running_mean": mean, "running_var": var}


def convolution_backward(
    x,
    weight,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    transposed=False,
    output_padding=0,
    bias=True,
    mask=(True, True, True),
    dtype=torch.float64,
):
    """A call as torch's autograd makes it."""
    x, weight = randn(*x), randn(*weight)
    stride, padding, dilation, output_padding = (
        [value] * (weight.dim() - 2) if isinstance(value, int) else value
        for value in (stride, padding, dilation, output_padding)
    )
    rest = stride, padding, dilation, transposed, output_padding, groups
    y = torch.convolution(x, weight, None, *rest)
    return {
        "grad_output": randn(*y.shape).to(dtype),
        "input": x.to(dtype),
        "weight": weight.to(dtype),
        "bias_sizes": [y.shape[1]] if bias else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "transposed": transposed,
        "output_padding": output_padding,
        "groups": groups,
        "output_mask": list(mask),
    }


def layer_norm(*shape, last=1, bias=True, eps=1e-5, dtype=torch.float64):
    return {
        "input": randn(*shape).to(dtype),
        "normalized_shape": list(shape[-last:]),
        "weight": randn(*shape[-last:]).to(dtype),
        "bias": randn(*shape[-last:]).to(dtype) if bias else None,
        "eps": eps,
    }


def layer_norm_backward(*shape, mask=(True, True, True), **options):
    case = layer_norm(*shape, **options)
    del case["eps"]
    grad = randn(*shape).to(case["input"].dtype)
    return {"grad_out": grad, **case, "output_mask": list(mask)}


def saved_by_layer_norm(which):
    def derive(case):
        x, shape = case["input"], case["normalized_shape"]
        return torch.native_layer_norm(x, shape, None, None, 1e-5)[which].detach()

    return derive


def attention(n, heads, length, others, width, causal=False, scale=None):
    return {
        "query": randn(n, heads, length, width),
        "key": randn(n, heads, others, width),
        "value": randn(n, heads, others, width),
        "dropout_p": 0.0,
        "is_causal": causal,
        "attn_mask": None,
        "scale": scale,
    }


def attention_backward(*shape, **options):
    case = attention(*shape, **options)
    return {"grad_out": randn(*case["query"].shape), **case}


def saved_by_attention(which):
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    names = list(attention(1, 1, 1, 1, 1))

    def derive(case):
        arguments = {name: case[name] for name in names}
        for name in ("query", "key", "value"):  # the kernel needs this layout
            arguments[name] = arguments[name].contiguous()
        return forward(**arguments)[which].detach()

    return derive


def embedding_backward(indices, words, width, padding=-1, dtype=torch.float64):
    return {
        "grad_output": randn(*indices, width).to(dtype),
        "indices": torch.randint(words, indices),
        "num_weights": words,
        "padding_idx": padding,
        "scale_grad_by_freq": False,
    }


ATTENTIONS = [((2, 2, 3, 4, 2), {}), ((1, 2, 4, 4, 2), {"causal": True, "scale": 0.3})]
# Of one slice, by what is batched. torch has no derivative by a mask.
ROW = randn(3, 4)
MASKS = {
    "(L, S), of all": lambda case: ROW,
    "(N, 1, L, S), of all": lambda case: torch.stack([ROW, -ROW]).unsqueeze(1),
    "(L, S)": lambda case: (case["query"][0, 0] @ case["key"][0, 0].mT).detach(),
    "(N, 1, L, S)": lambda case: (
        case["query"][:, :1] @ case["key"][:, :1].mT
    ).detach(),
    "(1, H, 1, S)": lambda case: (
        case["query"][:1, :, :1] @ case["key"][:1].mT
    ).detach(),
}
LAYER_NORMS = [
    layer_norm(2, 3, 4),
    layer_norm(4),
    layer_norm(2, 3, 4, last=2, bias=False),
    layer_norm(2, 4, eps=0.3),
    layer_norm(2, 4, dtype=torch.float32),
]
RMS_NORMS = [
    {name: value for name, value in case.items() if name != "bias"}
    for case in (layer_norm(2, 3, 4), layer_norm(4), layer_norm(2, 3, 4, last=2))
]
RMS_NORMS.append({**RMS_NORMS[0], "weight": None})
LAYER_NORM_BACKWARDS = [
    layer_norm_backward(2, 3, 4),
    layer_norm_backward(4),
    layer_norm_backward(2, 3, 4, last=2, bias=False, mask=(True, True, False)),
    layer_norm_backward(3, 4, mask=(False, True, True)),
    layer_norm_backward(3, 4, mask=(False, False, True)),
    layer_norm_backward(3, 4, dtype=torch.float32),
]
EMBEDDINGS = [
    embedding_backward((5,), 3, 2),
    embedding_backward((2, 3), 4, 2, padding=1),
    embedding_backward((), 4, 2),
    embedding_backward((4,), 3, 2, dtype=torch.float32),
]
LINEARS = [
    {
        "self": randn(4),
        "mat1": randn(3, 2),
        "mat2": randn(2, 4),
        "beta": 0.5,
        "alpha": 2.0,
    }
]
CONVOLUTIONS = [
    convolution_backward((1, 2, 5, 4), (3, 2, 3, 2)),
    convolution_backward((2, 2, 5, 4), (3, 2, 3, 2), stride=2, padding=1),
    convolution_backward((2, 2, 5, 6), (3, 2, 3, 2), stride=[2, 1], padding=[0, 1]),
    convolution_backward((2, 3, 5, 4), (2, 3, 1, 1), stride=2),
    convolution_backward((1, 2, 3, 3), (3, 2, 1, 1), padding=1),
    convolution_backward((1, 2, 3, 2), (3, 2, 1, 1), stride=2, padding=1),
    convolution_backward((1, 2, 7), (3, 2, 3), stride=2, padding=1, bias=False),
    convolution_backward((2, 2, 5), (3, 2, 1)),
    convolution_backward((1, 2, 9), (2, 2, 3), stride=2, padding=2, dilation=3),
    convolution_backward((2, 1, 6, 7), (2, 1, 2, 3), dilation=2),
    convolution_backward((1, 2, 3, 4, 3), (2, 2, 2, 3, 2), padding=[0, 1, 1]),
    convolution_backward((2, 4, 4, 4), (6, 2, 3, 3), groups=2, padding=1),
    convolution_backward((1, 3, 4, 4), (3, 1, 3, 3), groups=3, padding=1),
    convolution_backward((2, 2, 5, 5), (4, 1, 2, 2), groups=2, stride=2),
    convolution_backward((2, 2, 3, 4), (2, 3, 3, 2), transposed=True),
    convolution_backward(
        *((1, 4, 3, 3), (4, 3, 3, 3)),
        **{"transposed": True, "groups": 2, "dilation": 2, "padding": 1},
        **{"stride": 3, "output_padding": [2, 1]},
    ),
    convolution_backward((2, 2, 3), (2, 2, 4), transposed=True, stride=2, padding=1),
    convolution_backward((1, 2, 4, 4), (3, 2, 3, 3), mask=(False, True, False)),
    convolution_backward((1, 2, 4, 4), (3, 2, 3, 3), dtype=torch.float32),
    convolution_backward((1, 2, 4, 4), (3, 2, 2, 2), dtype=torch.bfloat16),
]
WITH_PLANES = [
    batch_norm(2, 4, 3, affine=False),
    batch_norm(2, 4, 3, 2),
    batch_norm(1, 4, 2, 2, 2, affine=False),
]
BATCH_NORMS = [batch_norm(3, 4), *WITH_PLANES]
NATIVE_BATCH_NORMS = [
    *BATCH_NORMS,
    batch_norm(1, 4, 3, 3),
    {**batch_norm(2, 3, 5), "bias": None},
]


OF_CUDNN = [case for case in NATIVE_BATCH_NORMS if case["weight"] is not None]


def forward(case):
    """The same call with the operator's order of arguments."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return {name: case[name] for name in (*names, "training", "momentum", "eps")}


def backward(case, mask=None):
    """The call that autograd makes for the backward of native_batch_norm."""
    if mask is None:  # without a weight there is no gradient of it
        mask = (True, case["weight"] is not None, case["bias"] is not None)
    return {
        "grad_out": randn(*case["input"].shape),
        "input": case["input"],
        "weight": case["weight"],
        "running_mean": case["running_mean"],
        "running_var": case["running_var"],
        "save_mean": None,
        "save_invstd": None,
        "train": case["training"],
        "eps": case["eps"],
        "output_mask": list(mask),
    }


def saved(which):
    """What the forward saves: the mean and 1 / sqrt(var + eps) of each channel."""

    def function(arguments):
        none = [None] * 4
        x, eps = arguments["input"], arguments.get("eps", arguments.get("epsilon"))
        saves = torch.native_batch_norm(x, *none, True, 0.1, eps)
        return saves[which].detach()

    return function


def by_cudnn(case):
    """The call of cuDNN's batch norm; its backward also takes what it reserves."""
    names = (*("input", "weight", "bias", "running_mean", "running_var"), "training")
    rest = {"exponential_average_factor": case["momentum"], "epsilon": case["eps"]}
    return {**{name: case[name] for name in names}, **rest}


def backward_by_cudnn(case):
    return {
        "input": case["input"],
        "grad_output": randn(*case["input"].shape),
        "weight": case["weight"],
        **dict.fromkeys(["running_mean", "running_var", "save_mean", "save_var"]),
        "epsilon": case["eps"],
        "reserveSpace": torch.empty(0, dtype=torch.uint8),
    }


def gaussian(shape, of_var, full=False, reduction="mean"):
    return {
        "input": randn(*shape),
        "target": randn(*shape),
        "var": randn(*of_var).square() + 0.5,
        "full": full,
        "eps": 1e-6,
        "reduction": reduction,
    }


GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}
CELLS = {
    torch.lstm_cell: 4,
    torch.gru_cell: 3,
    torch.rnn_tanh_cell: 1,
    torch.rnn_relu_cell: 1,
}


def recurrent(function, layers=1, both=False, bias=True, first=False, project=0):
    """A call as torch's modules make it, of sequences of 3 steps."""
    shape = (2, 3, 4) if first else (3, 2, 4)
    hidden, directions, params = 3, 1 + both, []
    seen = project or hidden
    for layer in range(layers):
        for _ in range(directions):
            gates = GATES[function] * hidden
            width = seen * directions if layer else shape[-1]
            params += [randn(gates, width), randn(gates, seen)]
            params += [randn(gates), randn(gates)] if bias else []
            params += [randn(project, hidden)] if project else []
    state = randn(layers * directions, 2, seen)
    if function is torch.lstm:
        state = (state, randn(layers * directions, 2, hidden))
    options = (bias, layers, 0.5, False, both, first)
    return dict(zip(map(str, range(9)), (randn(*shape), state, params, *options)))


def cell(function, *batch, bias=True):
    gates, state = 3 * CELLS[function], randn(*batch, 3)
    if function is torch.lstm_cell:
        state = (state, randn(*batch, 3))
    biases = (randn(gates), randn(gates)) if bias else (None, None)
    weights = randn(gates, 4), randn(gates, 3)
    return dict(zip(map(str, range(6)), (randn(*batch, 4), state, *weights, *biases)))


INSTANCE_NORMS = [instance_norm(2, 4, 3), instance_norm(1, 4, 3, 2, affine=False)]
GROUP_NORMS = [
    group_norm(2, 4, 3, groups=2),
    group_norm(1, 6, 3, 2, groups=3),
    group_norm(2, 4, 2, 2, groups=4, eps=0.3),
]
CASES = {
    "batch_norm, statistics of the slice": BATCH_NORMS,
    "batch_norm, groups of channels": WITH_PLANES,  # (N, C) has one value a group
    "batch_norm, layers that stay in eval mode": [
        {**running(case), "training": True} for case in BATCH_NORMS
    ],
    "instance_norm, layers that stay in eval mode": [
        {**case, "running_var": case["running_var"].square() + 0.5}
        for case in INSTANCE_NORMS
    ],
    "instance_norm, statistics of the slice": INSTANCE_NORMS,
    "batch_norm, statistics not written": BATCH_NORMS,
    "batch_norm, running statistics": [running(case) for case in BATCH_NORMS],
    "instance_norm, statistics not written": INSTANCE_NORMS,
    # By the statistics of the input; with running ones in test_layouts.
    "batch_norm, a batch of one": [
        batch_norm(1, 3, 2, 4),
        batch_norm(1, 3, 2, 2, 2, affine=False),
    ],
    "instance_norm, all positions in one dimension": [
        {**instance_norm(2, 3, 2, 4), "running_mean": None, "running_var": None},
    ],
    "batch_norm, statistics across the vmapped axis": BATCH_NORMS,
    "instance_norm, running statistics across the vmapped axis": INSTANCE_NORMS,
    "convolution_backward, weights by matrix products": CONVOLUTIONS,
    "native_batch_norm, running statistics": [
        forward(running(case)) for case in NATIVE_BATCH_NORMS
    ],
    "native_batch_norm_backward, running statistics": [
        *[backward(running(case)) for case in NATIVE_BATCH_NORMS],
        backward(running(batch_norm(2, 4, 3)), (False, True, False)),
        backward(running(batch_norm(2, 4, 3)), (True, False, False)),
    ],
    "native_batch_norm, statistics of the slice": [
        forward(case) for case in NATIVE_BATCH_NORMS
    ],
    "native_batch_norm_backward, statistics of the slice": [
        *[backward(case) for case in NATIVE_BATCH_NORMS],
        backward(batch_norm(2, 4, 3), (True, False, True)),
    ],
    "cudnn_batch_norm, running statistics": [
        by_cudnn(running(case)) for case in OF_CUDNN
    ],
    "cudnn_batch_norm, statistics of the slice": [by_cudnn(case) for case in OF_CUDNN],
    "cudnn_batch_norm_backward, statistics of the slice": [
        backward_by_cudnn(case) for case in OF_CUDNN
    ],
    "native_layer_norm, batches merged": LAYER_NORMS,
    "native_layer_norm_backward, batches merged": LAYER_NORM_BACKWARDS,
    "native_layer_norm_backward, differentiated again": LAYER_NORM_BACKWARDS,
    "attention on the CPU, batches merged": [attention(*a, **k) for a, k in ATTENTIONS],
    "attention_backward on the CPU, batches merged": [
        attention_backward(*a, **k) for a, k in ATTENTIONS
    ],
    "embedding_dense_backward, into memory of zeros": EMBEDDINGS,
    "addmm, batches merged": LINEARS,
    "mm, outer products": [{"self": randn(3, 1), "mat2": randn(1, 4)}],
    "bmm, outer products": [{"self": randn(2, 3, 1), "mat2": randn(2, 1, 4)}],
    "group_norm, where torch's own fails": [
        *GROUP_NORMS,
        group_norm(3, 4, groups=2),
        {**group_norm(1, 4, 3, groups=1), "weight": None, "bias": None},
    ],
    "layer_norm, where torch's own fails": [
        *LAYER_NORMS[:-1],
        {**layer_norm(2, 4), "weight": None, "bias": None},
    ],
    "rms_norm, where torch's own fails": RMS_NORMS,
    "in-place write to a buffer, left out": [{"0": randn(3), "1": 1.0}],
    "gaussian_nll_loss, under transforms": [
        gaussian((2, 3), (2, 3), full=True),
        gaussian((2, 3), (2,), reduction="sum"),
        gaussian((2, 3), (2, 1), reduction="none"),
    ],
    **{
        f"{function.__name__}, under transforms": [
            recurrent(function),
            recurrent(function, layers=2, both=True, first=True),
            recurrent(function, layers=2, bias=False),
        ]
        for function in GATES
    },
    **{
        f"{function.__name__}, under transforms": [
            cell(function, 2),
            cell(function, 2, bias=False),
        ]
        for function in CELLS
    },
}
CASES["lstm, under transforms"].append(recurrent(torch.lstm, both=True, project=2))


# A level that batches the weight or the bias too is an ensemble's and is not merged.
# Running statistics have no gradients. Batched weights are left to torch.
BATCHED = {
    "batch_norm, layers that stay in eval mode": ["input", "weight", "bias"],
    "instance_norm, layers that stay in eval mode": ["input"],
    "batch_norm, statistics across the vmapped axis": ["input"],
    "native_batch_norm, running statistics": ["input", "weight", "bias"],
    "native_batch_norm_backward, running statistics": ["grad_out", "input", "weight"],
    "native_batch_norm, statistics of the slice": ["input"],
    "native_batch_norm_backward, statistics of the slice": ["grad_out", "input"],
    "cudnn_batch_norm, running statistics": ["input", "weight", "bias"],
    "cudnn_batch_norm, statistics of the slice": ["input"],
    "cudnn_batch_norm_backward, statistics of the slice": ["input", "grad_output"],
    # The others' turn is in test_recurrent; all of them would be 3**6 choices.
    **{f"{cell.__name__}, under transforms": ["0", "1", "3"] for cell in CELLS},
}
SAVED_BY_LAYER_NORM = {"mean": saved_by_layer_norm(1), "rstd": saved_by_layer_norm(2)}
DERIVED = {
    "native_batch_norm_backward, statistics of the slice": {
        "save_mean": saved(1),
        "save_invstd": saved(2),
    },
    "cudnn_batch_norm_backward, statistics of the slice": {
        "save_mean": saved(1),
        "save_var": saved(2),  # 1 / sqrt(var + eps), despite the name
    },
    "native_layer_norm_backward, batches merged": SAVED_BY_LAYER_NORM,
    "native_layer_norm_backward, differentiated again": SAVED_BY_LAYER_NORM,
    "attention_backward on the CPU, batches merged": {
        "out": saved_by_attention(0),
        "logsumexp": saved_by_attention(1),
    },
}

# torch's own runs for what it computes correctly.
UNDER_AUTOCAST = {
    "batch_norm, running statistics",
    "group_norm, where torch's own fails",
    "layer_norm, where torch's own fails",
    "rms_norm, where torch's own fails",
}

# Uninitialised memory has no values to compare; test_zoo draws into it. An order in
# memory is not a value; test_normalisation has those. An address is not one, nor is an
# error; test_recurrent has those.
NO_VALUES = {
    "memory of its own for each slice",
    "copy in another order, under vmap",
    "is_contiguous in another order, under vmap",
    "data_ptr, of a recurrent layer's weights under transforms",
    "packed sequences, refused under vmap",
}
RULES = [rule for rule in registered() if rule.name not in NO_VALUES]


def force(monkeypatch, algorithm):
    """Use one algorithm for all shapes, and copy windows in several parts."""
    take_every_size(monkeypatch, algorithm, columns=50)
    change_regimes(
        monkeypatch, batch_norm={"batch": 0, "channel": 3}, layer_norm={"slice": 8}
    )
    take_any_memory(monkeypatch)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Let the rules of operators take calls of any size, also small ones."""
    force(monkeypatch, "products")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_equal_their_slow_forms(rule):
    """batched ≈ reference for every rule. A rule without cases fails here."""
    if isinstance(rule, OperatorRule):  # numbers do not depend on the device
        rule = dataclasses.replace(rule, devices=None)
    if rule.name.endswith(", under transforms"):  # which torch's own asks for first
        rule = dataclasses.replace(rule, accepts=lambda call: True)
    cases = CASES[rule.name]
    autocast = rule.name in UNDER_AUTOCAST
    options = {"batched": BATCHED.get(rule.name), "derived": DERIVED.get(rule.name)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # float64 stays
        compared = check_rule(rule, cases, site=OnALayer(), **options)
    assert compared >= 2 * len(cases)


@pytest.mark.parametrize("algorithm", convolution.ALGORITHMS)
def test_algorithms_equal_the_slow_form(algorithm, monkeypatch):
    """The gradients do not depend on the algorithm that computes them."""
    force(monkeypatch, algorithm)
    check_rule(OPERATOR, CONVOLUTIONS, batched=["grad_output", "input"])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "name, case", [("attention", attention), ("attention_backward", attention_backward)]
)
def test_masks_equal_the_slow_form(name, case, mask):
    """Attention, for masks that broadcast in every way torch allows."""
    (rule,) = [r for r in RULES if r.name.startswith(f"{name} ")]

    def masks(case):
        return MASKS[mask](case).to(case["query"].dtype)

    derived = {"attn_mask": masks, **DERIVED.get(rule.name, {})}
    batched = ["grad_out", "query", "key"]
    check_rule(rule, [case(2, 2, 3, 4, 2)], batched=batched, derived=derived)


def test_the_docstring_lists_every_rule():
    text = " ".join(vmapsafe.rules.__doc__.split())
    for rule in registered():
        assert rule.name in text, rule.name


(RULE,) = [r for r in registered() if r.name == "batch_norm, statistics of the slice"]
WRONG = {
    "a value off by 0.1 %": lambda call: RULE.batched(call) * 1.001,
    "a gradient off": lambda call: RULE.batched(call)
    + 1e-3 * (call["input"] - call["input"].detach()),
    "a dtype off": lambda call: RULE.batched(call).float(),
    "a forgotten batch dimension": lambda call: RULE.batched(call).flatten(),
    "the first slice for all": lambda call: RULE.batched(call) * 0 + 1,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_is_caught(wrong):
    """check_rule can fail, for each kind of mistake it is there for."""
    rule = dataclasses.replace(RULE, batched=WRONG[wrong])
    with pytest.raises(AssertionError):
        check_rule(rule, BATCH_NORMS, site=OnALayer())


SQUARE = FunctionRule(
    name="square",
    functions=(torch.square,),
    modes=MODES,
    accepts=lambda call: True,
    batched=lambda call: call["input"].square(),
    reference=slice_by_slice(lambda call: call["input"] * call["input"]),
)
IMAGES = [{"input": randn(2, 3, 4, 5)}]


def whole(x):
    """The batch inside vmap's wrappers."""
    while batched_levels((x,)):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def with_a_check(condition):
    """The square, and an error where the condition holds."""

    def batched(call):
        if condition(whole(call["input"])):
            raise RuntimeError("not this one")
        return call["input"].square()

    return batched


WRONG_SOMETIMES = {
    "float32": lambda x: x.dtype == torch.float32,
    "bfloat16": lambda x: x.dtype == torch.bfloat16,
    "channels last": lambda x: x.stride(-3) == 1,
    "an empty batch": lambda x: x.size(0) == 0,
}


@pytest.mark.parametrize("when", WRONG_SOMETIMES)
def test_a_rule_that_is_wrong_there_is_caught(when):
    """check_rule also tries other forms of cases in float64. torch's own square runs in
    each. A value off by ten percent, another shape and an error are all found."""
    assert check_rule(SQUARE, IMAGES) == 7
    condition = WRONG_SOMETIMES[when]

    def off(call):
        y = call["input"].square()
        if not condition(whole(call["input"])):
            return y
        return y.flatten() if when == "an empty batch" else 1.1 * y

    with pytest.raises(AssertionError, match="square, in_dims"):
        check_rule(dataclasses.replace(SQUARE, batched=off), IMAGES)
    raising = dataclasses.replace(SQUARE, batched=with_a_check(condition))
    with pytest.raises(RuntimeError, match="not this one"):
        check_rule(raising, IMAGES)
    declining = dataclasses.replace(
        raising, accepts=lambda call: not condition(call["input"][None])
    )
    if when in ("float32", "bfloat16"):  # what a call inside vmap shows
        assert check_rule(declining, IMAGES) == 6


def test_a_rule_may_fail_where_torch_fails():
    """torch's batch norm refuses an empty batch, so the rule may refuse it too."""
    with pytest.raises(RuntimeError, match="at least one element"):
        torch.func.vmap(nn.BatchNorm1d(4, track_running_stats=False))(randn(0, 2, 4))
    case = batch_norm(2, 4, affine=False)
    assert check_rule(RULE, [case], site=OnALayer(), batched=["input"]) == 2 + 1 + 2


def test_a_rule_that_does_not_take_the_case_is_caught():
    rule = dataclasses.replace(RULE, accepts=lambda call: False)
    with pytest.raises(AssertionError, match="does not accept"):
        check_rule(rule, BATCH_NORMS, site=OnALayer())


(OPERATOR,) = operator_rules()[convolution._backward]
WRONG_OPERATOR = {
    "a value off": lambda outs: (outs[0], outs[1] * 1.001, outs[2]),
    "a gradient cut": lambda outs: (outs[0], outs[1].detach(), outs[2]),
    "an output left out": lambda outs: (outs[0], outs[1], None),
    "the first slice for all": lambda outs: (
        outs[0],
        outs[1][:1].expand_as(outs[1]),
        outs[2],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_OPERATOR)
def test_a_wrong_rule_of_an_operator_is_caught(wrong):
    """check_rule finds mistakes in rules of operators too."""

    def batched(call):
        return WRONG_OPERATOR[wrong](OPERATOR.batched(call))

    with pytest.raises(AssertionError):
        check_rule(dataclasses.replace(OPERATOR, batched=batched), CONVOLUTIONS[:1])


def test_a_rule_of_an_operator_that_takes_nothing_is_caught():
    """Without this check, torch's own rule would pass for it."""
    rule = dataclasses.replace(OPERATOR, accepts=lambda call: False)
    with pytest.raises(AssertionError, match="does not take"):
        check_rule(rule, CONVOLUTIONS[:1])
