"""CLIP as a classifier by words: its logits by hand, one prompt and many, and what does not fit."""

import json
import shutil

import pytest
import torch

from classifiers import load_classifier
from guided_diffusion.files.prompts import prompts_file, read_prompts
from guided_diffusion.guidance import log_prob, of_class

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def images(count=3, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by_hand(transformers, folder, prompts, seen):
    """exp(scale) cos(image, prompt), (N, K), of the features that transformers has."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=seen, **tokens)
    image, text = answer.image_embeds, answer.text_embeds
    cosine = torch.einsum("nd,kd->nk", image, text)
    cosine /= image.norm(dim=1)[:, None] * text.norm(dim=1)
    torch.testing.assert_close(answer.logits_per_image, model.logit_scale.exp() * cosine, **EXACT)
    return (model.logit_scale.exp() * cosine).detach()


@pytest.mark.parametrize("size", [16, 24])
def test_logits_are_scaled_cosine_similarities(transformers, clip_folder, prompts, size):
    x = images(size=size)
    clip = load_classifier(f"clip:{clip_folder}", num_classes=10, prompts=str(prompts), image_size=size)
    expected = by_hand(transformers, clip_folder, read_prompts(str(prompts)), clip.transform(x))
    torch.testing.assert_close(clip(x), expected, **EXACT)
    assert expected.std(dim=1).min() > 0.01  # the prompts do differ


def test_input_is_clips(clip_folder, prompts):
    clip = load_classifier(f"clip:{clip_folder}", num_classes=10, prompts=str(prompts))
    assert (clip.transform.size, clip.transform.mode) == (16, "bicubic")
    assert clip.transform.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert clip.transform.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))


def test_similarities_of_a_network_in_float16_are_not_rounded(clip_folder, prompts):
    clip = load_classifier(f"clip:{clip_folder}", num_classes=10, prompts=str(prompts)).half()
    logits = clip(images())
    assert logits.dtype == torch.float32 and (logits != logits.half()).any()


def test_one_prompt_is_weighed_against_the_empty_one(transformers, clip_folder):
    x = images()
    clip = load_classifier(f"clip:{clip_folder}", prompts="a digit 3")  # whatever num_classes
    similarity = by_hand(transformers, clip_folder, ["a digit 3", ""], clip.transform(x))
    torch.testing.assert_close(clip(x), similarity, **EXACT)
    of_words = torch.zeros(len(x), dtype=torch.int64)
    expected = similarity[:, 0] - torch.logsumexp(similarity, dim=1)
    torch.testing.assert_close(log_prob(clip(x), of_words), expected, **EXACT)
    alone = log_prob(clip(x), of_words, 1.0, 0.0) + torch.tensor(2.0).log()
    torch.testing.assert_close(alone, similarity[:, 0], **EXACT)


@pytest.mark.parametrize("prompts_text", ["a digit 3", None])
def test_gradient_reaches_the_image_through_the_preprocessor(clip_folder, prompts, prompts_text):
    clip = load_classifier(
        f"clip:{clip_folder}", num_classes=10, prompts=prompts_text or str(prompts)
    ).double()
    x, direction = images(1, 20).double(), images(1, 20).double().flip(3)
    leaf = x.clone().requires_grad_()
    slope = (torch.autograd.grad(clip(leaf).log_softmax(1)[0, 0], leaf)[0] * direction).sum()
    with torch.no_grad():
        ends = [clip(x + h * direction).log_softmax(1)[0, 0] for h in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4) and slope != 0


def test_a_rule_of_one_class_asks_for_it_whatever_the_labels():
    seen = []

    def rule(x, y, step):
        seen.append(y)
        return x

    rule.looks_at = "denoised"
    wrapped = of_class(rule, 0)
    wrapped(images(), torch.tensor([7, 999, 0]), None)
    assert seen[0].tolist() == [0, 0, 0] and wrapped.looks_at == "denoised"


# Prompts


def test_prompts_of_a_file_and_of_a_text(tmp_path, prompts):
    assert read_prompts(str(prompts)) == [f"a digit {n}" for n in range(10)]
    assert read_prompts("a dog on a hill.") == ["a dog on a hill.", ""]
    assert prompts_file("a/dog" * 100) is None and prompts_file(str(prompts)) == prompts
    windows = tmp_path / "windows"
    windows.write_bytes("\ufeffein Hund\r\nein Kätzchen \r\n\r\n".encode())
    assert read_prompts(str(windows)) == ["ein Hund", "ein Kätzchen"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a dog\n\na cat\n", "no prompt in line 2"),
        (b"\na dog\n\na cat\n", "no prompt in line 1"),  # nor is every label moved by one
        (b"", "no prompt in line 1"),
        (b"\xff\xfe\xfa", "not text in UTF-8"),
    ],
)
def test_files_that_are_no_prompts(tmp_path, content, words):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(str(tmp_path / "p.txt"))


def test_a_file_that_is_not_there_is_no_prompt():
    with pytest.raises(FileNotFoundError, match=r"no file absent\.txt: give"):
        read_prompts("absent.txt")


# What does not fit


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("clip:CLIP", {}, "compares images with words: give --prompts"),
        (
            "clip:CLIP",
            {"prompts": "FILE", "num_classes": 7},
            "has 10 prompts, one for each class, and num_classes is 7",
        ),
        ("clip:CLIP", {"prompts": "a digit " * 9}, r"'a digit .*'\.\.\. has 56 tokens, CLIP takes 12"),
        ("clip:VIT", {"prompts": "FILE"}, "holds vit, not clip; an image classifier is hf:FOLDER"),
        ("hf:CLIP", {"num_classes": 2}, "does not fit CLIPForImageClassification: missing_keys classifier"),
        ("clip:CLIP+hf:VIT", {"prompts": "a dog"}, "hf:.* knows classes and not the prompt 'a dog'"),
        ("hf:VIT", {"prompts": "a dog"}, "prompts 'a dog' are for clip:FOLDER, not for hf:"),
        (
            "clip:CLIP",
            {"prompts": "FILE", "softplus_beta": 3.0},
            r"no ReLU to smooth \(smooth already: sigmoid\)",
        ),
    ],
)
def test_one_line_says_what_does_not_fit(clip_folder, vit_folder, prompts, name, options, words):
    name = name.replace("CLIP", str(clip_folder)).replace("VIT", str(vit_folder))
    options = {"num_classes": 10, **options}
    if options.get("prompts") == "FILE":
        options["prompts"] = str(prompts)
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["tokenizer", "text_projection"])
def test_folders_that_lack_something(clip_folder, tmp_path, missing):
    folder = tmp_path / "copy"
    shutil.copytree(clip_folder, folder)
    if missing == "tokenizer":
        for file in [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
            file.unlink()
        words = "has no tokenizer"
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 6}))
        words = "does not fit CLIPModel"
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(f"clip:{folder}", prompts="a digit")
    assert "\n" not in str(caught.value)
