#!/usr/bin/env bash
# ./guided_sample.sh [PRESET] [FLAGS...]
#
# digits (the default while the ImageNet files are absent): guided against unguided on a small problem that ships with the project.
# imagenet128-resnet101, imagenet128-resnet50, imagenet128-unguided, imagenet128-finetuned: the paper's ImageNet 128x128 runs.
# All other flags go on to scripts/compare_guidance.py (digits) or scripts/classifier_sample.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

if [[ $# -gt 0 && $1 != -* ]]; then
    preset=$1
    shift
elif [[ -e $here/pretrained_models/128x128_diffusion.pt ]]; then
    preset=imagenet128-resnet101
    echo "preset: $preset (found pretrained_models/128x128_diffusion.pt)" >&2
else
    preset=digits
    echo "preset: digits (no pretrained_models/128x128_diffusion.pt; for ImageNet see python scripts/download.py --list)" >&2
fi

case $preset in
    digits) exec "$python" "$here/scripts/compare_guidance.py" --preset "$preset" "$@" ;;
    *) exec "$python" "$here/scripts/classifier_sample.py" --preset "$preset" "$@" ;;
esac
