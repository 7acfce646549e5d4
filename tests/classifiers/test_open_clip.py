"""A CLIP under open_clip's names answers as transformers' does, and what is no plain one is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from classifiers import classifier_files, load_classifier

BLOCK = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}


def state_of(model):
    """The weights of transformers' CLIPModel as open_clip names them, (name, tensor) by hand."""
    vision, text = model.vision_model, model.text_model
    state = {
        "logit_scale": model.logit_scale,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "text_projection": model.text_projection.weight.T,
    }
    norms = {"visual.ln_pre": vision.pre_layrnorm, "visual.ln_post": vision.post_layernorm}
    for name, norm in {**norms, "ln_final": text.final_layer_norm}.items():
        state |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for tower, encoder in (("visual.transformer", vision.encoder), ("transformer", text.encoder)):
        for i, layer in enumerate(encoder.layers):
            theirs, attention = layer.state_dict(), layer.self_attn
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            block = {name: theirs[other] for name, other in BLOCK.items()}
            block["attn.in_proj_weight"] = torch.cat([part.weight for part in parts])
            block["attn.in_proj_bias"] = torch.cat([part.bias for part in parts])
            state |= {f"{tower}.resblocks.{i}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def original(transformers, clip_folder):
    """original(act): a CLIP of random weights, its biases and norms too, in float16's numbers, and its
    tokenizer.
    """

    def original(act="gelu"):
        torch.manual_seed(0)
        config = transformers.CLIPConfig.from_pretrained(clip_folder)
        config.vision_config.hidden_act = config.text_config.hidden_act = act
        config.vision_config.num_hidden_layers, config.text_config.intermediate_size = 2, 25
        model = transformers.CLIPModel(config).eval()
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                torch.nn.init.normal_(parameter, 0.5, 0.5)
            parameter.data = parameter.data.half().float()
        return model, transformers.CLIPTokenizer.from_pretrained(clip_folder)

    return original


CONFIG = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": [16, 16], "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 22, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"},
}
CONFIG["model_cfg"]["vision_cfg"] |= {"mlp_ratio": 2, "patch_dropout": 0.5, "pool_type": "tok"}
CONFIG["model_cfg"]["text_cfg"] |= {"mlp_ratio": 1.6, "hf_model_name": None}  # 25 of 25.6


def changed(**values):
    """CONFIG with other values of its parts: vision_cfg={"layers": 3}."""
    config = json.loads(json.dumps(CONFIG))
    for part, content in values.items():
        whole = config if part in config else config["model_cfg"]
        whole[part] = whole.get(part, {}) | content if isinstance(content, dict) else content
    return config


@pytest.fixture
def folder(tmp_path, original):
    """folder(config, act, binary): as open_clip saves one, with the files of a tokenizer."""

    def folder(config=CONFIG, act="gelu", binary=False):
        model, tokenizer = original(act)
        tokenizer.save_pretrained(tmp_path)
        state = state_of(model)
        if binary:  # as training leaves it
            wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "open_clip_pytorch_model.bin")
        else:
            halves = {name: tensor.half() for name, tensor in state.items()}
            save_file(halves, tmp_path / "open_clip_model.safetensors")
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return tmp_path, model, tokenizer

    return folder


@pytest.mark.parametrize(("act", "quick", "binary"), [("gelu", False, True), ("quick_gelu", True, False)])
def test_logits_are_those_of_transformers(folder, tmp_path, act, quick, binary):
    path, model, tokenizer = folder(changed(quick_gelu=quick), act, binary)
    (path / "config.json").write_text('{"architecture": "of timm, beside it"}')
    (prompts := tmp_path / "prompts.txt").write_text("a digit 3\na\ndig it 12\n")
    clip = load_classifier(f"clip:{path}", num_classes=3, prompts=str(prompts), image_size=20)
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert str(clip.transform) == "16x16 bilinear, mean 0.5 0.4 0.3, std 0.2 0.3 0.4"
    tokens = tokenizer(prompts.read_text().splitlines(), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=clip.transform(x), **tokens).logits_per_image
        torch.testing.assert_close(clip(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(dim=1).min() > 1e-3 and expected.std(dim=0).min() > 1e-3
    files = classifier_files(f"clip:{path}", "")
    weights = "open_clip_pytorch_model.bin" if binary else "open_clip_model.safetensors"
    assert files["classifier_path"]() == path / weights and "classifier_open_clip_config.json" in files


BAD = {
    "ResNet": ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, r"vision_cfg\.layers \[3, 4, 6, 3\], which is not"),
    "timm's": ({"vision_cfg": {"timm_model_name": "convnext"}}, r"vision_cfg\.timm_model_name 'convnext'"),
    "mean": ({"vision_cfg": {"pool_type": "avg"}}, r"vision_cfg\.pool_type 'avg'"),
    "another text": ({"text_cfg": {"hf_model_name": "roberta"}}, r"text_cfg\.hf_model_name 'roberta'"),
    "CoCa": ({"multimodal_cfg": {"layers": 1}}, r"model_cfg\.multimodal_cfg \{'layers': 1\}"),
    "SigLIP": ({"init_logit_bias": -10}, r"model_cfg\.init_logit_bias -10"),
    "no text": ({"text_cfg": None}, r"model_cfg\.text_cfg None"),
    "heads": (
        {"text_cfg": {"heads": 3}},
        "no CLIP can be built .*not a multiple of the number of attention heads .3",
    ),
    "no mean": ({"preprocess_cfg": {"mean": None}}, r"the mean None and the std \[0\.2"),
    "nothing": ({"model_cfg": None}, "has None as its model_cfg"),
    "other weights": ({"text_cfg": {"width": 32}}, "safetensors does not fit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_networks_are_refused(folder, kind):
    values, words = BAD[kind]
    path, _, _ = folder(changed(**values))
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(f"clip:{path}", prompts="a digit")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("tokenizer*", r"has no tokenizer: add tokenizer\.json, or vocab\.json and merges\.txt, to"),
        ("open_clip_model.safetensors", r"no weights at .*open_clip_model\.safetensors"),
        ("open_clip_config.json", r"has no config\.json; give a folder"),
    ],
)
def test_files_that_are_missing(folder, missing, words):
    path, _, _ = folder()
    for file in path.glob(missing):
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_classifier(f"clip:{path}", prompts="a digit")


def test_other_words_are_refused(folder):
    path, _, tokenizer = folder()
    tokenizer.add_tokens(["digit</w>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="the tokenizer has a token 22, and CLIP knows 22"):
        load_classifier(f"clip:{path}", prompts="a digit</w>")
