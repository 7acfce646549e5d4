"""Tiny networks of transformers, drawn at random and saved as its users save theirs."""

import pytest
import torch

SIZE, CLASSES = 16, 10
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Of words that no merges put together: letters, those that end a word, and as in CLIP's the ends of a text.
LETTERS = [*"adgit", *(f"{letter}</w>" for letter in "adgit0123456789"), "<|startoftext|>", "<|endoftext|>"]
START, END = range(len(LETTERS))[-2:]


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="networks by folder need transformers")


@pytest.fixture(scope="session")
def vit_folder(transformers, tmp_path_factory):
    """A ViT of 10 classes and 16 pixels, which are resized bilinearly."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TOWER, image_size=SIZE, patch_size=8, num_labels=CLASSES)
    preprocessor = transformers.ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    return saved(tmp_path_factory, transformers.ViTForImageClassification(config), preprocessor)


@pytest.fixture(scope="session")
def resnet_folder(transformers, tmp_path_factory):
    """A ResNet of ReLUs for 10 classes and 16 pixels."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    preprocessor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    return saved(tmp_path_factory, transformers.ResNetForImageClassification(config), preprocessor)


@pytest.fixture(scope="session")
def clip_folder(transformers, tmp_path_factory):
    """A CLIP of 16 pixels that knows prompts of 10 of LETTERS, with beginning and end."""
    torch.manual_seed(0)
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {**TOWER, **ends, "vocab_size": len(LETTERS), "max_position_embeddings": 12}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**TOWER, "image_size": SIZE, "patch_size": 8}, projection_dim=12
    )
    preprocessor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(LETTERS)}, merges=[])
    return saved(tmp_path_factory, transformers.CLIPModel(config), preprocessor, tokenizer)


@pytest.fixture
def prompts(tmp_path):
    """A file with a prompt for each digit."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a digit {n}\n" for n in range(CLASSES)))
    return path


def saved(factory, *parts):
    folder = factory.mktemp("saved")
    for part in parts:
        part.save_pretrained(folder)
    return folder
