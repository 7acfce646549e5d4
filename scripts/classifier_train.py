"""Train a classifier on your own images: of noisy ones, as guided-diffusion guides with, or of clean ones.

    python scripts/classifier_train.py --data_dir photos --image_size 64 --num_classes 10 --iterations 20000
    python scripts/classifier_train.py --data_dir photos --image_size 32 --num_classes 10 --noised False \
        --classifier_type cifar_resnet20 --optimizer sgd --lr 0.1 --anneal_lr True --random_crop 4

Writes, every --save_interval steps, modelS.pt and optS.pt, from which the same command resumes;
classifier.safetensors, in float16, for --classifier_path of the samplers; loss.png; and progress.csv, log.txt
and training.json; of images in --val_data_dir the accuracy, in validation.csv and accuracy.json. Plain
python, or torchrun for several processes. The flags are those of guided-diffusion, and a few more.
"""

import _beside  # noqa: F401
import torch

import classifiers
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.training import ClassifierTrainFlags
from guided_diffusion.script_util import create_classifier
from guided_diffusion.training.classifiers import CleanObjective, noisy_objective, train_classifier


def main():
    config = parse(ClassifierTrainFlags, __doc__, {})
    torch.manual_seed(config.seed)
    folder = train_clean(config) if config.classifier_type else train_noisy(config)
    print_result(str(folder))


def train_clean(config):
    """A network by its name, fed as `load_classifier` feeds it later."""
    called = classifiers.load_classifier(config.classifier_type, "random", num_classes=config.num_classes)
    called.requires_grad_(True)
    return train_classifier(config, called.network, CleanObjective, called)


def train_noisy(config):
    """guided-diffusion's classifier, which is told the timestep."""
    names = [
        name for name in config.defaults() if name.startswith("classifier_") and name != "classifier_type"
    ]
    flags = {name: getattr(config, name) for name in names}
    flags |= {"image_size": config.image_size, "classifier_use_fp16": False}
    network = create_classifier(**flags, num_classes=config.num_classes)
    return train_classifier(config, network, lambda called: noisy_objective(config, called), network)


if __name__ == "__main__":
    run_main(main, resumable=True)
