#!/usr/bin/env bash
# ./guided_sample.sh [PRESET] [FLAGS...]
#
# digits (the default while the ImageNet files are absent): guided against unguided on a small problem that ships with the project.
# digits-edm: the same problem with EDM's sampler, two forms of guidance over numbers of steps.
# imagenet128-resnet101, imagenet128-resnet50, imagenet128-unguided, imagenet128-finetuned: the paper's ImageNet 128x128 runs.
# imagenet64-edm-resnet101, imagenet64-edm-unguided: those with EDM at 64x64.
# All other flags go on to scripts/compare_guidance.py (digits), compare_edm.py (digits-edm), edm_sample.py or classifier_sample.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
weights=$here/pretrained_models
python=${PYTHON:-python}

for flag in "$@"; do
    if [[ $flag == --preset || $flag == --preset=* ]]; then
        echo "error: write the preset's name first, without --preset: ./guided_sample.sh imagenet128-resnet50 ..." >&2
        exit 2
    fi
done
if [[ $# -gt 0 && $1 != -* ]]; then
    preset=$1
    shift
elif [[ -e $weights/128x128_diffusion.pt && (-e $weights/resnet101-cd907fc2.pth || -e $weights/resnet101_weight_V2.pth) ]]; then
    preset=imagenet128-resnet101
    echo "preset: $preset (its files are in pretrained_models)" >&2
else
    preset=digits
    echo "preset: digits (the ImageNet files are not in pretrained_models; python scripts/download.py imagenet128-resnet101 fetches them)" >&2
fi

case $preset in
    digits) script=compare_guidance ;;
    digits-edm) script=compare_edm ;;
    *-edm-*) script=edm_sample ;;
    *) script=classifier_sample ;;
esac
exec "$python" "$here/scripts/$script.py" --preset "$preset" "$@"
