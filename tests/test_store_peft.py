"""PEFT's folders: what an adapter is at any task, written for others to load, and what others wrote, as a start."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from folders import make_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import clora_core as core
import clora_store as store
from clora_core.errors import FormatError, InvalidValueError, OptionError, RankError, StateError

U = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def wide(adapter):
    return core.Adapter(*(None if array is None else array.astype(np.float64) for array in adapter))


def matrix(state, name, task):
    """A R B in float64, in rows of the whole weight."""
    layer = state.layers[name]
    dW = core.delta(wide(store.adapter_at(state, name, task)))
    if layer.target.rows is None:
        return dW
    whole = np.zeros((layer.target._replace(rows=None).matrix[0], dW.shape[1]))
    whole[slice(*layer.target.rows)] = dW
    return whole


def exported(folder):
    """module -> update, as PEFT computes it: lora_B lora_A alpha / r; and the sizes of its entries' factors."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    out, sizes = {}, {}
    for module in config["target_modules"]:
        A, B = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert A.shape[0] == B.shape[1] == config["r"] == config["lora_alpha"]
        out[module], sizes[module] = B @ A, abs(B) @ abs(A)
    return out, sizes, config, tensors


def subnormals(tensors, module):
    """What a product may be off by since small float16 numbers are rounded by up to 2^-25, however small they are."""
    A, B = (abs(tensors[f"base_model.model.{module}.lora_{x}.weight"]) for x in "AB")
    eta = 2.0**-25
    return eta * (B.sum(axis=1, keepdims=True) + A.sum(axis=0, keepdims=True) + A.shape[0] * eta)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), spare=st.integers(0, 2), every=st.booleans(), dtype=st.sampled_from(sorted(U)))
def test_an_export_is_the_function_within_one_rounding_of_each_factor(tmp_path_factory, seed, spare, every, dtype):
    factors = "every-task" if every else "first-task"
    state = make_state(seed, layers=3, spare=0 if every else spare, factors=factors, head=False)
    for task in (None, *state.tasks):
        folder = tmp_path_factory.mktemp("peft")
        told = store.export_peft(state, folder, task=task, dtype=dtype)
        got, sizes, _, tensors = exported(folder)
        assert not any(told.error.values())
        for name in state.layers:
            # A and R B are rounded once each, and the float64 product R B before that.
            limit = (2 * U[dtype] + U[dtype] ** 2 + 2.0**-49) * sizes[name] + 1e-300
            limit += subnormals(tensors, state.layers[name].target.module) if dtype == "float16" else 0.0
            assert (abs(got[name] - matrix(state, name, task)) <= limit * (1 + 2.0**-8)).all()
            norm = np.linalg.norm(matrix(state, name, task))  # float64 both, by sums of under 2^10 terms
            assert abs(told.size[name] - norm) <= 2.0**-42 * np.linalg.norm(sizes[name])


@pytest.mark.parametrize("factors", ["first-task", "every-task"])
def test_a_difference_has_the_rank_it_should(tmp_path, factors):
    state = make_state(1, layers=3, spare=2 if factors == "first-task" else 0, factors=factors)
    told = store.export_peft(state, tmp_path, task="task-2", since="task-0")
    got, sizes, config, tensors = exported(tmp_path)
    ranks = []
    for name, layer in state.layers.items():
        if layer.kind == "head":
            continue
        exact = matrix(state, name, "task-2") - matrix(state, name, "task-0")
        assert (abs(got[name] - exact) <= (2 * 2.0**-24 + 2.0**-40) * sizes[name]).all()
        pair = [state.snapshots[t][name].R.shape[0] for t in ("task-2", "task-0")]
        ranks.append(max(pair) if factors == "first-task" else sum(pair))
    assert told.rank == config["r"] == max(ranks)
    assert told.heads == ()
    assert not any(key.endswith(".bias") for key in tensors)


def test_a_task_of_a_higher_rank_has_the_spare_directions_last(tmp_path):
    """The formula itself, in exact numbers: A and its spare columns, R, B and its spare rows."""
    rng = np.random.default_rng(12)
    A, R, B, A_spare, B_spare = (
        (rng.integers(-8, 9, shape) / 4).astype(np.float32) for shape in ((6, 2), (3, 3), (2, 5), (6, 2), (2, 5))
    )
    adapter = core.Adapter(A, R[:2, :2], 0 * R[:2, :2], B)
    layer = store.Layer("linear", store.Target("q.weight", (6, 5)), adapter, spare=(A_spare, B_spare))
    state = store.State({"q": layer}, tasks=("a",), snapshots={"a": {"q": store.Snapshot(R)}})
    store.export_peft(state, tmp_path, task="a")
    exact = np.hstack([A, A_spare[:, :1]]) @ R @ np.vstack([B, B_spare[:1]])
    assert (exported(tmp_path)[0]["q"] == exact).all()


def test_a_lower_rank_states_its_error(tmp_path):
    state = make_state(2, layers=3, head=False)
    told = store.export_peft(state, tmp_path, rank=1)
    got, sizes, config, _ = exported(tmp_path)
    assert config["r"] == told.rank == 1
    for name in state.layers:
        exact = matrix(state, name, None)
        s = np.linalg.svd(exact, compute_uv=False)
        best = np.sqrt(np.sum(s[1:] ** 2))
        assert abs(told.error[name] - best) <= 2.0**-40 * s[0]  # Eckart and Young; both by an SVD in float64
        rounding = 2.0**-22 * np.linalg.norm(sizes[name])
        assert abs(np.linalg.norm(got[name] - exact) - told.error[name]) <= rounding + 2.0**-40 * s[0]


def test_padding_to_a_rank_of_vllm_changes_nothing(tmp_path):
    state = make_state(3, layers=3)
    with pytest.raises(OptionError, match=r"vLLM takes no classifiers.*heads=False"):
        store.export_peft(state, tmp_path / "no", vllm=True)
    assert not (tmp_path / "no").exists()
    told = store.export_peft(state, tmp_path / "vllm", vllm=True, heads=False)
    store.export_peft(state, tmp_path / "plain", heads=False)
    assert told.rank == 8
    one, two = exported(tmp_path / "vllm")[0], exported(tmp_path / "plain")[0]
    assert all((one[name] == two[name]).all() for name in two)
    assert store.vllm_problems(tmp_path / "vllm") == []
    assert store.vllm_problems(tmp_path / "vllm", max_lora_rank=8) == []
    assert store.vllm_problems(tmp_path / "vllm", max_lora_rank=1) == ["r=8 is above max_lora_rank=1"]
    assert store.vllm_problems(tmp_path / "vllm", max_lora_rank=7) == [
        f"max_lora_rank=7 is none of {store.VLLM_RANKS}",
        "r=8 is above max_lora_rank=7",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"modules_to_save": ["head"]}, "modules_to_save is not empty"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias is not 'none'"),
        ({"peft_type": "LOHA"}, "peft_type is not LORA"),
        ({"rank_pattern": {"a": 1}}, "rank_pattern is set: some versions ignore it"),
        ({"r": None}, "r is missing"),
    ],
)
def test_what_vllm_refuses_is_said(tmp_path, change, problem):
    store.export_peft(make_state(4, head=False), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert problem in store.vllm_problems(tmp_path)


def test_an_export_goes_into_a_new_folder_and_the_configuration_comes_last(tmp_path, monkeypatch):
    state = make_state(5)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(StateError, match="the folder is not new"):
        store.export_peft(state, tmp_path / "used")
    from clora_store import _peft_export

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(_peft_export, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        store.export_peft(state, tmp_path / "half")
    assert not list((tmp_path / "half").iterdir())  # so that the next try finds it new


def test_what_peft_could_not_load_is_not_exported(tmp_path):
    state = make_state(8)
    heads = store.State({"head": state.layers["head"]})
    with pytest.raises(OptionError, match="PEFT loads no folder without LoRA"):
        store.export_peft(heads, tmp_path / "out")
    linear = state.layers["block.0.proj"]
    alike = linear._replace(target=linear.target._replace(weight="a.head.weight"))
    with pytest.raises(OptionError, match="PEFT tells modules by the end of their names"):
        store.export_peft(store.State({"a.head": alike, "head": state.layers["head"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_that_overflows_is_refused(tmp_path):
    state = make_state(9, head=False)
    state.layers["block.0.proj"].adapter.A[:] *= np.float32(1e6)
    with pytest.raises(InvalidValueError, match=r"lora_B.weight' does not fit its dtype"):
        store.export_peft(state, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    state.layers["block.0.proj"].adapter.A[:] = np.nan
    with pytest.raises(FormatError, match="not finite"):
        store.export_peft(state, tmp_path / "out")


def test_routings_in_half_precision_are_summed_in_float32(tmp_path):
    """I + 2^-9 I in bfloat16 is I: what was learnt would be gone."""
    state = make_state(10, layers=1, head=False, dtype=ml_dtypes.bfloat16)
    layer = state.layers["block.0.proj"]
    r = layer.adapter.R_old.shape[0]
    eye = np.eye(r).astype(ml_dtypes.bfloat16)
    adapter = layer.adapter._replace(R_old=eye, R_delta=(eye.astype(np.float32) * 2.0**-9).astype(eye.dtype))
    state = state._replace(layers={"block.0.proj": layer._replace(adapter=adapter)})
    store.export_peft(state, tmp_path / "out")
    got, sizes, _, _ = exported(tmp_path / "out")
    exact = (1 + 2.0**-9) * adapter.A.astype(np.float64) @ adapter.B.astype(np.float64)
    assert (abs(got["block.0.proj"] - exact) <= 2.0**-22 * sizes["block.0.proj"]).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"task": "task-9"}, StateError, r"no snapshot of task 'task-9'.*'task-0'"),
        ({"since": "task-9"}, StateError, "no snapshot of task 'task-9'"),
        ({"rank": 0}, RankError, "rank >= 1"),
        ({"dtype": "float64"}, OptionError, "unknown dtype"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        store.export_peft(make_state(6), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_heads_of_an_earlier_task_and_convolutions_are_exported(tmp_path):
    rng = np.random.default_rng(12)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    V = draw(3, 5)
    conv = core.Adapter(draw(4, 2), draw(2, 2), draw(2, 2), draw(2, 30))
    state = store.State(
        {
            "conv": store.Layer("conv", store.Target("conv.weight", (4, 3, 2, 5)), conv),
            "h": store.Layer("head", store.Target("h.weight", (3, 4), bias="h.bias"), core.Adapter(None, V, V, None)),
        },
        tasks=("a",),
        snapshots={"a": {"conv": store.Snapshot(draw(2, 2)), "h": store.Snapshot(3 * V)}},
    )
    store.export_peft(state, tmp_path, task="a")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (tensors["base_model.model.h.weight"] == 3 * V[:, :4]).all()
    assert (tensors["base_model.model.h.bias"] == 3 * V[:, 4]).all()
    A, B = (tensors[f"base_model.model.conv.lora_{x}.weight"] for x in "AB")
    assert (A.shape, B.shape) == ((2, 3, 2, 5), (4, 2, 1, 1))
    exact = core.delta(wide(store.adapter_at(state, "conv", "a"))).reshape(4, 3, 2, 5)
    got = np.einsum("orxy,rihw->oihw", B.astype(np.float64), A.astype(np.float64))
    size = np.einsum("orxy,rihw->oihw", abs(B).astype(np.float64), abs(A).astype(np.float64))
    assert (abs(got - exact) <= 2.0**-22 * size).all()
    back = store.import_peft(tmp_path).layers["conv"]
    assert back.kind == "conv"
    assert back.target.shape == (4, 3, 2, 5)
    assert (A.reshape(2, 30) == back.adapter.B).all()


# --- import ------------------------------------------------------------------------------------------------------


def peft_folder(folder, *, rank=2, config=None, dtype=np.float32, tensors=None):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    folder.mkdir(exist_ok=True)
    shapes = {"q": (6, 5), "deep.v": (4, 5)}
    weights = {}
    for module, (d_out, d_in) in shapes.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = draw(rank, d_in)
        weights[f"base_model.model.{module}.lora_B.weight"] = draw(d_out, rank)
    save_file(tensors(weights) if tensors else weights, folder / "adapter_model.safetensors")
    base = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": ["q", "v"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**base, **(config or {})}))
    return weights


SCALES = [
    ({}, {"q": 1.5, "deep.v": 1.5}),
    ({"use_rslora": True}, {"q": 3 / 2**0.5, "deep.v": 3 / 2**0.5}),
    ({"alpha_pattern": {"v": 8}}, {"q": 1.5, "deep.v": 4.0}),
    ({"alpha_pattern": {"^deep.v": 8}}, {"q": 1.5, "deep.v": 4.0}),
    ({"alpha_pattern": {"^v": 8, "^q": 4}}, {"q": 2.0, "deep.v": 1.5}),  # ^ is the start of the whole path
    ({"alpha_pattern": {r".*\.v": 8, "eep": 9}}, {"q": 1.5, "deep.v": 4.0}),
]


@pytest.mark.parametrize(("config", "scales"), SCALES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_an_import_is_the_same_function(tmp_path, config, scales, dtype, orthonormal):
    weights = peft_folder(tmp_path, config=config, dtype=dtype)
    state = store.import_peft(tmp_path, orthonormal=orthonormal, task="before")
    assert state.tasks == state.unobserved == ("before",)
    for module, scale in scales.items():
        A, B = (weights[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        adapter = wide(state.layers[module].adapter)
        size = scale * (abs(B) @ abs(A))
        if not orthonormal:
            assert (adapter.B == A).all()
            assert (abs(core.delta(adapter) - scale * (B @ A)) <= 2.0**-24 * size).all()
        else:
            # Frames of float32: backward stable, so relative to the norm; 2^6 covers the constants of rank 2.
            assert np.linalg.norm(core.delta(adapter) - scale * (B @ A)) <= 2.0**-18 * np.linalg.norm(size)
            assert core.orthonormality_defect(adapter.A) <= 2 * core.bounds.orthonormal(6, 2, "float32")
        assert (store.adapter_at(state, module, "before").R_old == state.layers[module].adapter.R_old).all()
    folder = tmp_path / "saved"
    store.save(folder, state)
    assert store.load(folder).provenance["source"] == "PEFT LoRA"


def test_export_and_import_give_back_the_function(tmp_path):
    state = make_state(7, layers=1, head=True)
    store.export_peft(state, tmp_path)
    back = store.import_peft(tmp_path)
    assert set(back.layers) == {"block.0.proj", "head"}
    got, exact = core.delta(wide(back.layers["block.0.proj"].adapter)), matrix(state, "block.0.proj", None)
    assert (abs(got - exact) <= 2.0**-22 * exported_sizes(tmp_path)["block.0.proj"]).all()
    V = core.routing(wide(state.layers["head"].adapter))
    assert (abs(back.layers["head"].adapter.R_old - V) <= 2.0**-24 * abs(V)).all()
    assert back.layers["head"].target.bias == "head.bias"


def exported_sizes(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.block.0.proj.lora_{x}.weight"] for x in "AB")
    return {"block.0.proj": abs(B).astype(np.float64) @ abs(A)}


def test_fan_in_fan_out_is_the_other_layout(tmp_path):
    peft_folder(tmp_path, config={"fan_in_fan_out": True})
    assert store.import_peft(tmp_path).layers["q"].target == store.Target("q.weight", (5, 6), "in,out")


def test_two_names_of_one_tensor_are_refused(tmp_path):
    peft_folder(tmp_path, tensors=lambda w: {**w, "q.lora_A.weight": w[LORA_A]})
    with pytest.raises(FormatError, match="is there twice"):
        store.import_peft(tmp_path)


REFUSED = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights is set"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is set"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
    ({"a_setting_of_next_year": True}, "a_setting_of_next_year is set"),
    ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "megatron_core": "megatron.core"}, None),
    ({"lora_alpha": 10**400}, "lora_alpha is no number"),
    ({"alpha_pattern": {".*.*x": 1}}, "a pattern in alpha_pattern is more than a name"),
    ({"peft_type": "LOHA"}, "this is no LoRA"),
    ({"use_dora": True}, "no plain LoRA. Got use_dora"),
    ({"bias": "lora_only"}, "biases were trained"),
    ({"lora_alpha": "16"}, "lora_alpha is no number"),
    ({"lora_alpha": True}, "lora_alpha is no number"),
    ({"alpha_pattern": {"(a+)+b": 1}}, "a pattern in alpha_pattern is more than a name"),
    ({"rank_pattern": []}, None),
    ({"alpha_pattern": 3}, "alpha_pattern is no object"),
]


@pytest.mark.parametrize(("config", "match"), REFUSED)
def test_what_is_no_plain_lora_is_refused(tmp_path, config, match):
    peft_folder(tmp_path, config=config)
    if match is None:
        assert store.import_peft(tmp_path).layers
        return
    with pytest.raises(FormatError, match=re.escape(match)):
        store.import_peft(tmp_path)


LORA_A, LORA_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
SPOILED = [
    (lambda w: {k: v for k, v in w.items() if "q.lora_A" not in k}, FormatError, "module 'q' has half a LoRA"),
    (
        lambda w: {**w, "base_model.model.q.lora_magnitude_vector": w[LORA_A]},
        FormatError,
        "no",
    ),
    (lambda w: {**w, LORA_A: np.zeros((3, 5), np.float32)}, FormatError, "do not chain"),
    (lambda w: {**w, LORA_B: np.zeros((6, 2), np.float32)}, InvalidValueError, "learnt"),
    (
        lambda w: {**w, LORA_B: np.full((6, 2), np.nan, np.float32)},
        InvalidValueError,
        "NaN",
    ),
    (lambda w: {**w, LORA_A: np.zeros((2, 5), np.int32)}, FormatError, "dtype"),
    (lambda w: {**w, LORA_A: np.zeros(2, np.float32)}, FormatError, "do not chain"),
]


@pytest.mark.parametrize(("tensors", "error", "match"), SPOILED)
def test_tensors_that_are_no_lora_are_refused(tmp_path, tensors, error, match):
    peft_folder(tmp_path, tensors=tensors)
    with pytest.raises(error, match=match):
        store.import_peft(tmp_path)


def test_a_rank_above_the_sizes_of_a_layer_is_imported(tmp_path):
    """PEFT allows it, and padding for vLLM makes it."""
    weights = peft_folder(tmp_path / "wide", rank=7)
    state = store.import_peft(tmp_path / "wide")
    for module in ("q", "deep.v"):
        A, B = (weights[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        adapter = wide(state.layers[module].adapter)
        assert adapter.R_old.shape[0] == min(B.shape[0], 5)
        exact = 3 / 7 * (B @ A)
        assert np.linalg.norm(core.delta(adapter) - exact) <= 2.0**-18 * np.linalg.norm(abs(B) @ abs(A))
    small = make_state(11, layers=1, head=False)
    store.export_peft(small, tmp_path / "padded", vllm=True)
    back = store.import_peft(tmp_path / "padded").layers["block.0.proj"].adapter
    assert back.R_old.shape == small.layers["block.0.proj"].adapter.R_old.shape  # what was padded is gone
    assert (back.A == small.layers["block.0.proj"].adapter.A).all()


def test_pickles_are_never_read(tmp_path):
    peft_folder(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"no adapter_model.safetensors.*never read"):
        store.import_peft(tmp_path)
    with pytest.raises(FormatError, match="no PEFT folder"):
        store.import_peft(tmp_path / "nowhere")
