"""Language models of transformers in our blocks: the same logits, the same bytes on the way out, runs that begin so."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from cfpretrain.base.console import UserError
from cfpretrain.core.attention import Visibility, sdpa
from cfpretrain.core.block import make_rotation
from cfpretrain.core.context import Context
from cfpretrain.core.model import Network
from cfpretrain.core.segments import Segment, build_layout, with_rotary_positions
from cfpretrain.core.texts import Texts
from cfpretrain.evaluation.source import load_source
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.language_layouts import EMBEDDING, HEAD
from cfpretrain.export.language_model import open_language_model, write_language_model
from cfpretrain.run.build import find_checkpoint
from tests.closeness import disagreement
from tests.processes import REPOSITORY
from tools import import_language_model

VOCABULARY, LENGTH = 50, 40
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OF_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "gpt2": GPT2Config(**_OF_GPT2),
    "gpt2 untied": GPT2Config(
        **_OF_GPT2, activation_function="gelu", n_inner=24, layer_norm_epsilon=1e-3, tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**_SIZES),
    "llama 3": LlamaConfig(
        **_SIZES,
        head_dim=6,
        rms_norm_eps=1e-2,
        rope_theta=100.0,
        rope_scaling={**_LLAMA3, "original_max_position_embeddings": 16},
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(**_SIZES, head_dim=10, rope_theta=1e3),
    "qwen3 tied": Qwen3Config(**{**_SIZES, "num_key_value_heads": 4}, head_dim=8, tie_word_embeddings=True),
}


def make_theirs(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 5 + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of CONFIGS with random weights, as transformers saves it; tests read them only."""
    folder = tmp_path_factory.mktemp("language models")
    for name in CONFIGS:
        make_theirs(name).save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


def make_ours(folder: Path) -> Network:
    model = open_language_model(folder, "MODEL")
    settings = model.settings
    texts = Texts(settings.vocabulary, settings.max_tokens, settings.design)
    network = Network([texts], settings.design, settings.depth)
    network.load_state_dict({name: model.read(name) for name in model.shapes})
    return network.eval().requires_grad_(False)


IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def as_text(ids_BT: Tensor, begin: int = 0) -> Segment:
    place_T = torch.arange(begin, begin + ids_BT.shape[1])[None]
    return Segment("text", place_T - begin, clean=ids_BT, positions_BL=place_T, rotary_BL=place_T)


@torch.no_grad()
def their_logits(folder: Path, ids_BT: Tensor = IDS) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BT).logits
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_of_a_text_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    """Each token is a clean AR step of its own."""
    segments = with_rotary_positions([dataclasses.replace(as_text(IDS), rotary_BL=None)])
    logits = make_ours(folders[name])(segments, build_layout(segments).intervals_BMI)["text"]
    assert disagreement(logits, their_logits(folders[name])) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_under_a_dense_causal_mask_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    network = make_ours(folders[name])
    design, (x_BMD, _) = network.trunk.design, network.text_embedder([as_text(IDS)])
    visibility = Visibility(sdpa.attend, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), takes_kv_heads=False)
    rotation = make_rotation(design, torch.arange(LENGTH)[None], torch.float32) if design.rotary_base else None
    for block in network.trunk.blocks:
        x_BMD = block(x_BMD, visibility, None, rotation)
    assert disagreement(network.text_head(x_BMD), their_logits(folders[name])) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_of_tokens_read_one_by_one_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    context = Context(make_ours(folders[name]), LENGTH)
    logits = [context.read(as_text(IDS[:, i : i + 1], i))["text"] for i in range(LENGTH)]
    assert disagreement(torch.cat(logits, 1), their_logits(folders[name])) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_padding_before_or_behind_a_text_changes_no_logits(folders: dict[str, Path], name: str) -> None:
    network, want = make_ours(folders[name]), their_logits(folders[name])[:, : LENGTH - 7]
    for num_before in (0, 7):
        place_T = torch.arange(LENGTH) - num_before
        has_T = (place_T >= 0) & (place_T < LENGTH - 7)
        text = dataclasses.replace(
            as_text(IDS.roll(num_before, 1)),
            positions_BL=place_T.clamp(min=0)[None],
            is_padding_BL=~has_T.expand(2, -1),
        )
        segments = with_rotary_positions([text])
        layout = build_layout(segments)
        logits = network(segments, layout.intervals_BMI, place_BM=layout.place_BM)["text"]
        assert disagreement(logits[:, has_T], want) < 1e-5


# ---------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_came_in_goes_out_byte_for_byte(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make_theirs(name).to(dtype).save_pretrained(tmp_path / "in")
    write_language_model(tmp_path / "out", open_language_model(tmp_path / "in", "MODEL"))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_several_files_in_and_out(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    model, whole = open_language_model(tmp_path / "in", "MODEL"), open_language_model(folders[name], "MODEL")
    assert all(torch.equal(model.read(one), whole.read(one)) for one in whole.shapes)
    write_language_model(tmp_path / "out", model, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in theirs.state_dict().items())


def test_a_head_that_was_trained_is_no_longer_tied(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    model = open_language_model(folders["gpt2"], "MODEL")

    def read(name: str) -> Tensor:
        return model.read(name) * (2 if name == HEAD else 1)

    write_language_model(tmp_path / "out", dataclasses.replace(model, read=read))
    assert "tie_word_embeddings: false" in capsys.readouterr().out
    again = open_language_model(tmp_path / "out", "MODEL")
    assert torch.equal(again.read(HEAD), 2 * again.read(EMBEDDING))
    assert disagreement(their_logits(tmp_path / "out"), 2 * their_logits(folders["gpt2"])) < 1e-6


def test_names_and_buffers_of_older_checkpoints(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 as its makers published it has no prefix, and has its masks as tensors."""
    tensors = load_file(folders["gpt2"] / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["gpt2"] / "config.json").read_bytes())
    model, want = (open_language_model(folder, "MODEL") for folder in (tmp_path, folders["gpt2"]))
    assert model.shapes == want.shapes
    assert all(torch.equal(model.read(name), want.read(name)) for name in want.shapes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type: expected one of gpt2, llama, qwen3, got 'mamba'"),
        ("llama", {"attention_bias": True}, "attention_bias: expected False, got True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: expected none, or rope_type"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "rope_scaling: expected none, or rope_type",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_scaling: expected none, or rope_type"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_scaling: expected none, or rope_type"),
        (
            "llama",
            {"rope_scaling": {**_LLAMA3, "factor": 10**400}, "rope_parameters": None},
            "rope_scaling: expected none, or rope_type",
        ),
        (
            "llama",
            {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None},
            "num_attention_heads: expected at most hidden_size = 32, got 64",
        ),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: expected between 1e-30 and 1, got 0"),
        ("llama", {"num_key_value_heads": 3}, "expected a number of key-value heads that divides 4, got 3"),
        ("llama", {"hidden_size": 0}, "hidden_size: expected between 1 and"),
        ("llama", {"num_key_value_heads": 4}, "of another shape: model.layers.0.self_attn.k_proj.weight (16, 32)"),
        ("llama", {"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ("llama", {"num_hidden_layers": 1}, "unknown: model.layers.1."),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: expected True, got False"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: expected 'gelu_new' or"),
        ("gpt2", {"n_head": 5}, "n_head: expected a divisor of n_embd = 32, got 5"),
    ],
)
def test_what_our_blocks_do_not_compute_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    plain = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | changes))
    (tmp_path / "model.safetensors").write_bytes((folders[name] / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as caught:
        open_language_model(tmp_path, "MODEL")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_language_model(tmp_path, "MODEL")

    refused("MODEL: expected a folder with config.json")
    (tmp_path / "config.json").write_text("[")
    refused("config.json cannot be read")
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(r"MODEL: .* holds no model\.safetensors, and pickles, as pytorch_model\.bin is one, are not read; save it")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("expected names of .safetensors files beside it")
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = load_file(folders["llama"] / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].half()}, tmp_path / "model.safetensors")
    refused("expected all tensors in one of fp32, bf16 and fp16")


# ---------------------------------------------------------------------------
# Runs

TINY = [str(REPOSITORY / "configs" / "tiny.yaml")]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_begins_with_the_trunk_of_a_language_model(
    folders: dict[str, Path], tmp_path: Path, name: str, capsys
) -> None:
    import_language_model.run(folders[name], tmp_path / "run", TINY, ["model.num_classes=3"])
    said = capsys.readouterr().out
    assert "initialised: class_embedder, image_embedder, noise_head" in said
    assert "no place for text_embedder.embedding_table.weight" in said
    model, found = open_language_model(folders[name], "MODEL"), find_checkpoint(tmp_path / "run")
    assert found.config.model.design == model.settings.design
    assert found.config.model.depth == 2
    network = found.load_model()
    for key, value in network.named_parameters():
        if key.startswith("trunk."):
            assert torch.equal(value, model.read(key))
    assert float(network.image_embedder.x_proj.weight.abs().max()) > 0
    assert found.open_weights("raw").read("noise_head.linear.weight").count_nonzero() == 0
    export(tmp_path / "run", tmp_path / "export", ExportSettings())
    for folder in ("run", "export"):
        loaded = load_source(tmp_path / folder, torch.device("cpu")).model
        assert loaded.trunk.design == model.settings.design
        assert all(torch.equal(value, loaded.get_parameter(key)) for key, value in network.named_parameters())


def test_a_config_of_another_trunk_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit the config: tensors unknown: trunk\.blocks\.1\.norm1\.weight"):
        import_language_model.run(folders["llama"], tmp_path / "run", TINY, ["model.depth=1"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("llama", "model.norm_eps=0.1", "model.norm_eps: expected 1e-06, as MODEL: .* has it, got 0.1; leave it out"),
        ("llama", "model.rotary_base=7", r"model.rotary_base: expected 10000.0, as .*, got 7.0; leave it out"),
        ("llama 3", "model.rotary_scaling=[]", r"model.rotary_scaling: expected \(8.0, .*, got \(\); leave it out"),
        ("gpt2", "model.mlp=gelu", "model.mlp: expected gelu_tanh, as MODEL: .* has it, got gelu; leave it out"),
        ("gpt2", "model.num_heads=8", "model.num_heads: expected 4, as MODEL: .* has it, got 8; leave it out"),
    ],
)
def test_what_no_tensor_shows_stays_the_language_models(
    folders: dict[str, Path], tmp_path: Path, name: str, override: str, message: str
) -> None:
    """Else its weights would be taken, and mean something else."""
    with pytest.raises(UserError, match=message):
        import_language_model.run(folders[name], tmp_path / "run", TINY, [override])
    assert not (tmp_path / "run").exists()
