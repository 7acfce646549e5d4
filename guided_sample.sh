#!/usr/bin/env bash
# ./guided_sample.sh [PRESET] [FLAGS...]
#
# digits (the default while the ImageNet files are absent): guided against unguided on a small problem that
# ships with the project. digits-edm: the same problem with EDM's sampler, over numbers of steps. digits-dit:
# the same with a latent diffusion transformer, with and without classifier-free guidance.
# imagenet128-resnet101 and others: the paper's runs; python scripts/presets.py lists all presets, and the
# script of each, which takes all other flags.
set -euo pipefail
# Where the caller closed a stream, bash may have this file in its place, and every echo is an error.
[[ -e /dev/fd/1 && ! /dev/fd/1 -ef ${BASH_SOURCE[0]} ]] || exec > /dev/null
[[ -e /dev/fd/2 && ! /dev/fd/2 -ef ${BASH_SOURCE[0]} ]] || exec 2> /dev/null

file=${BASH_SOURCE[0]}
while [[ -L $file ]]; do # called through a link
    target=$(readlink -- "$file")
    [[ $target == /* ]] || target=$(dirname -- "$file")/$target
    file=$target
done
here=$(CDPATH='' cd -- "$(dirname -- "$file")" && pwd)
weights=$here/pretrained_models

python=${PYTHON:-}
for candidate in python python3; do
    if [[ -z $python ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3,))' 2> /dev/null; then
        python=$candidate
    fi
done
if [[ -z $python ]]; then
    echo "error: neither python nor python3 is found here: set PYTHON to an interpreter" >&2
    exit 1
fi

for flag in "$@"; do
    if [[ $flag == --preset || $flag == --preset=* ]]; then
        echo "error: write the preset's name first, without --preset: ./guided_sample.sh digits ..." >&2
        exit 2
    fi
done
if [[ $# -gt 0 && $1 != -* ]]; then
    preset=$1
    shift
elif [[ -e $weights/128x128_diffusion.pt
    && (-e $weights/resnet101-cd907fc2.pth || -e $weights/resnet101_weight_V2.pth) ]]; then
    preset=imagenet128-resnet101
    echo "preset: $preset (its files are in pretrained_models)" >&2
else
    preset=digits
    echo "preset: digits (the ImageNet files are not in pretrained_models;" \
        "python scripts/download.py imagenet128-resnet101 fetches them)" >&2
fi

script=$("$python" "$here/scripts/presets.py" "$preset")
exec "$python" "$here/scripts/$script" --preset "$preset" "$@"
