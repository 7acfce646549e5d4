"""SD-XL: two text encoders, a pooled text and sizes; and weights in shards."""

import json

import pytest
import torch
from helpers import call, load_samples, load_script
from tiny_pipelines import BETAS, STEPS, levels_of, noise_like, sampled, tiny, with_scheduler

from guided_diffusion.adapters.diffusers import Pipeline, PipelineNetwork, load_pipeline
from guided_diffusion.adapters.pipeline_folder import pipeline_files

pytest.importorskip("diffusers")
SIZES = (64, 48, 3, 5, 24, 16)
AS_THEIRS = {"original_size": SIZES[:2], "crops_coords_top_left": SIZES[2:4], "target_size": SIZES[4:]}
SHARDED = ("unet", "text_encoder_2")


@pytest.fixture(scope="module")
def sdxl():
    return tiny("sdxl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose larger networks are in shards, with a copy of the weights that is not read."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = tiny("sdxl", folder)
    for name in SHARDED:
        (file,) = (folder / name).glob("*.safetensors")
        whole = file.rename(file.with_name("other.fp16.safetensors")).stat().st_size
        getattr(pipe, name).save_pretrained(folder / name, max_shard_size=whole * 2 // 3)
    return folder


@pytest.mark.parametrize(
    ("scheduler", "negative", "sizes"),
    [
        ("EulerDiscreteScheduler", "", None),
        ("EulerDiscreteScheduler", "dog", SIZES),
        ("DDIMScheduler", "dog", None),
    ],
)
def test_texts_sizes_and_classifier_free_guidance_are_the_pipelines_own(sdxl, scheduler, negative, sizes):
    options = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    pipe = with_scheduler(sdxl, scheduler, **BETAS, timestep_spacing="leading", steps_offset=1, **options)
    network = PipelineNetwork(Pipeline.of(pipe), prompt="a cat", negative_prompt=negative, sizes=sizes)
    noise = noise_like(network)
    asked = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0, "latents": noise}
    asked |= {"negative_prompt": [negative] * 2} if negative else {}
    theirs = pipe(["a cat"] * 2, **asked, **(AS_THEIRS if sizes else {})).images
    levels = levels_of(network, pipe.scheduler)
    ours = sampled(network.denoiser(torch.tensor([5, 7]), 3.0), noise, levels, pipe.scheduler)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    told = network.text(noise, torch.tensor([True, False]))
    is_zero = (
        not told["encoder_hidden_states"][0].any() and not told["added_cond_kwargs"]["text_embeds"][0].any()
    )
    assert is_zero == (negative == "")


def test_shards_are_read_and_recorded_and_other_files_are_not(folder, sdxl):
    files = dict(pipeline_files(folder))
    assert all(path.is_file() for path in files.values())
    for name in SHARDED:
        own = [file for file in files if file.startswith(f"{name}/")]
        assert any(file.endswith(".safetensors.index.json") for file in own)
        assert sum(file.endswith(".safetensors") for file in own) > 1
        assert not any("other" in file for file in own)
    assert {"tokenizer_2/tokenizer_config.json", "vae/config.json"} <= files.keys()
    read, kept = load_pipeline(folder), Pipeline.of(sdxl)
    networks = [[pipeline.network, *(encoder for _, encoder in pipeline.texts)] for pipeline in (read, kept)]
    for ours, theirs in zip(*networks, strict=True):
        theirs = theirs.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    assert (read.factor, read.zero_negative, read.latent) == (kept.factor, kept.zero_negative, kept.latent)


def test_a_run_is_guided_and_its_record_holds_the_shards(folder, tmp_path):
    flags = (
        "--num_samples 2 --batch_size 2 --steps 2 --device cpu --prompt car --cfg_scale 2 --num_classes 10 "
    )
    flags += "--classifier_type digits_guide --softplus_beta 3 --classifier_scale 5 --sizes 64,48,3,5,24,16"
    main = load_script("pipeline_sample").main
    done = call(main, ["--pipeline", folder, "--out", tmp_path / "out", *flags.split()])
    assert done.code == 0, done.err
    assert load_samples(tmp_path / "out")[0].shape == (2, 16, 16, 3)
    run, log = ((tmp_path / "out" / name).read_text() for name in ("run.json", "log.txt"))
    settings = json.loads(run)["settings"]
    assert dict(pipeline_files(folder)).keys() <= settings["sha256"].keys()
    assert "transformers" in settings["versions"] and "classifier digits_guide: sees" in log


@pytest.mark.parametrize(
    ("kind", "options", "told", "message"),
    [
        ("sd", {}, {"sizes": SIZES}, "6 sizes, but the network of StableDiffusionPipeline is told none"),
        ("ddpm", {}, {"prompt": None, "sizes": SIZES}, "sizes, but the network of DDPMPipeline is told noth"),
        ("sdxl", {}, {"sizes": SIZES[:4]}, "4 sizes, but the network of StableDiffusionXLPipeline is told 6"),
        (
            "sdxl",
            {"projection_class_embeddings_input_dim": 5 * 8 + 12},
            {},
            "asks for pooled states of 4 numbers, and its text encoders say 12",
        ),
        ("sdxl", {"cross_attention_dim": 16}, {}, "asks for hidden states of 16 numbers, .* say 40"),
        ("sdxl", {"time_cond_proj_dim": 8}, {}, "time_cond_proj_dim 8: its network asks for more"),
    ],
)
def test_texts_and_sizes_that_do_not_fit_are_refused(kind, options, told, message):
    pipeline = Pipeline.of(tiny(kind, **options))
    with pytest.raises(ValueError, match=message):
        PipelineNetwork(pipeline, **{"prompt": "a cat", **told})


def test_a_network_without_its_text_encoders_is_refused(sdxl, monkeypatch):
    monkeypatch.setattr(sdxl, "text_encoder_2", None)
    with pytest.raises(ValueError, match="hidden states of 40 numbers, and its text encoders say 16"):
        PipelineNetwork(Pipeline.of(sdxl), prompt="a cat")
    monkeypatch.setattr(sdxl, "text_encoder", None)
    with pytest.raises(ValueError, match="there is no text encoder"):
        PipelineNetwork(Pipeline.of(sdxl), prompt="a cat")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("../unet/weights.safetensors", ValueError, "no index of the .safetensors beside it"),
        ("weights.bin", ValueError, "no index of the .safetensors beside it"),
        ("gone.safetensors", FileNotFoundError, "gone.safetensors is not there, which"),
    ],
)
def test_an_index_that_names_other_files_is_refused(tmp_path, name, error, message):
    tiny("ddpm", tmp_path)
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    for read in (load_pipeline, lambda folder: list(pipeline_files(folder))):
        with pytest.raises(error, match=message):
            read(tmp_path)
