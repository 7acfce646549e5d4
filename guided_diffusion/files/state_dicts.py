"""State dicts as people have them: inside a checkpoint, under a wrapper's names, from an older torch.

torch puts the versions of the modules into an attribute `_metadata` of a state dict, and its modules read it
to take older files. So every function here that changes names carries it along.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from guided_diffusion.files.pickle_data import printable

# What torch's wrappers put into the names of the network that they hold.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DEEPEST = 4


# In a checkpoint


def choose_state_dict(
    content: Any, source: str | Path, key: str | None = None, prefer: str = ""
) -> dict[str, Tensor]:
    """The one state dict in what a file holds, as its network without wrappers would name it.

    key: which one, where there are several: "ema", "state_dict", or "state_dict.teacher" for the tensors of
    state_dict whose names begin with teacher. prefer: the one to take of several, where no key is given.
    Raises ValueError that says what there is to choose from, or what the file holds instead.
    """
    found = dict(_state_dicts(content))
    if not found:
        raise ValueError(f"{source} {_instead(content)}")
    named = [f"{printable(name)} ({len(state)} tensors)" for name, state in found.items() if name]
    choices = ", ".join(named[:9])
    if key is not None:
        chosen = _under_key(found, key)
        if len(chosen) != 1:
            begin = ", ".join(dict.fromkeys(b for state in found.values() for b in _beginnings(state)))
            raise ValueError(
                f"{source} has no single network under --checkpoint_key {printable(key)}; "
                f"it holds {choices or 'one'}, whose names begin with {printable(begin)}"
            )
        return unwrapped(chosen[0])
    if len(found) > 1 and prefer in found:
        return unwrapped(found[prefer])
    if len(found) > 1:
        raise ValueError(f"{source} holds several networks: {choices}; choose one with --checkpoint_key")
    return unwrapped(next(iter(found.values())))


def _state_dicts(
    content: Any, label: str = "", depth: int = 0, opened: set[int] | None = None
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """(place, such as "ema" or "a.b", state dict) of all in a checkpoint, without what optimisers keep."""
    opened = set() if opened is None else opened
    if not isinstance(content, Mapping) or is_optimiser(content) or depth > _DEEPEST:
        return
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        if content or not depth:
            yield label, content
        return
    if id(content) in opened:  # references that multiply would otherwise be followed for ever
        return
    opened.add(id(content))
    for key, value in content.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{label}.{key}" if label else key, depth + 1, opened)


def _under_key(found, key):
    """The state dict of that place, or the parts of others whose names begin so."""
    if key in found:
        return [found[key]]
    parts = []
    for label, state in found.items():
        prefix = f"{key.removeprefix(f'{label}.')}."
        if part := {name: tensor for name, tensor in state.items() if name.startswith(prefix)}:
            parts.append(renamed(_with_metadata(part, _metadata(state)), partial(_without, prefix)))
    return parts


def _beginnings(state):
    """What the names begin with: the parts of a network, or the networks of a training."""
    return list(dict.fromkeys(name.split(".")[0] for name in state))


def is_optimiser(content: Any) -> bool:
    """Whether this is the state of one of torch's optimizers."""
    return "param_groups" in content and "state" in content


def _instead(content):
    if not isinstance(content, Mapping):
        return f"does not hold a state dict, that is tensors by name, but a {type(content).__name__}"
    if is_optimiser(content) or any(isinstance(v, Mapping) and is_optimiser(v) for v in content.values()):
        return "is an optimiser's file, without a network's weights: give the file of the model or of its EMA"
    keys = ", ".join(printable(str(key)) for key in list(content)[:5])
    return f"does not hold a state dict, that is nothing but tensors by name; it holds {keys}"


# Names


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The state dict and its modules' versions under other names; as it is where two would become one."""
    result = OrderedDict((rename(name), tensor) for name, tensor in state.items())
    metadata = _metadata(state)
    if len(result) < len(state):
        return _with_metadata(state, metadata)
    # A module's name is the beginning of its tensors' names, so it changes as theirs do; "" stays the root.
    moved = {rename(f"{name}.").removesuffix("."): versions for name, versions in metadata.items() if name}
    return _with_metadata(result, {**{name: metadata[name] for name in ("",) if name in metadata}, **moved})


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that DataParallel, torch.compile, FSDP and SWA's AveragedModel put around a network's
    own.
    """
    state = renamed(state, lambda name: _WRAPPER.sub("", name))
    while names := [name for name in state if name != "n_averaged"]:
        if not all(name.startswith("module.") for name in names):
            break
        state.pop("n_averaged", None)  # how many networks SWA has averaged
        state = renamed(state, partial(_without, "module."))
    return state


def _without(prefix, name):
    return name.removeprefix(prefix)


def _under_names_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that fit the network's own best: its own; those without wrappers, and
    without what all begin with (Lightning's `model.`); or those of a network that is itself wrapped.
    """
    bare = unwrapped(state)
    beginnings = [""]
    for parts in zip(*(name.split(".")[:-1] for name in bare), strict=False):
        if len(set(parts)) > 1:
            break
        beginnings.append(f"{beginnings[-1]}{parts[0]}.")
    candidates = [renamed(state, str), bare]
    candidates += [renamed(bare, partial(_without, beginning)) for beginning in beginnings[1:]]
    candidates += [renamed(bare, "module.{}".format)]
    return max(candidates, key=lambda candidate: len(own.keys() & candidate.keys()))  # of equals the first


def _metadata(state):
    """The versions by module, as far as they are what torch writes: a file could hold anything there."""
    metadata = getattr(state, "_metadata", None)
    return {
        name: {"version": versions["version"]}
        for name, versions in (metadata.items() if isinstance(metadata, dict) else ())
        if isinstance(name, str) and isinstance(versions, dict) and isinstance(versions.get("version"), int)
    }


def _with_metadata(state, metadata):
    state = OrderedDict(state)
    if metadata:
        state._metadata = metadata
    return state


# Into a network


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state_dict` into `module`, as strictly as torch does: what torch takes, such as weights from
    before BatchNorm counted its batches, is taken, under the names of a wrapper too. `source` names it in the
    error.

    A module that was built on the meta device takes the tensors themselves, in its own dtypes: nothing is
    held twice.

    Raises ValueError with the first missing, unexpected or misshapen name, both shapes, and how many there
    are of each; the module is then as it was.
    """
    own = module.state_dict()
    state = _under_names_of(own, state_dict)
    assign = any(tensor.is_meta for tensor in own.values())
    if assign:
        for name in state.keys() & own.keys():
            state[name] = state[name].to(own[name].dtype)
    misshapen = _misshapen(own, state)
    before = _copy(own, assign) if misshapen or own.keys() != state.keys() else None
    try:
        fitting = renamed(state, str)
        for name in misshapen:
            del fitting[name]
        missing, unexpected = _load(module, fitting, assign)
        trouble = None
    except (RuntimeError, ValueError) as error:
        missing, unexpected, trouble = [], [], error
    missing = [name for name in missing if name not in misshapen]
    if misshapen or missing or unexpected or trouble:
        if before:
            _load(module, before, assign)
        raise ValueError(
            f"{source} {_misfit(own, state, misshapen, missing, unexpected, trouble)}"
        ) from trouble


def _copy(own, assign):
    """What puts the module back to where it was."""
    copy = renamed(own, str)
    if not assign:
        copy.update((name, tensor.clone()) for name, tensor in own.items())
    return copy


def _load(module, state, assign):
    """(missing, unexpected names); RuntimeError for other shapes."""
    try:
        return module.load_state_dict(state, strict=False, assign=assign)
    except ValueError:
        # MNASNet insists on a version, which safetensors and plain dicts lack: theirs is the present one.
        if _metadata(state):
            raise
        theirs = {n: {"version": m._version} for n, m in module.named_modules() if not _is_torchs(m)}
        state = _with_metadata(state, theirs)
        return module.load_state_dict(state, strict=False, assign=assign)


def _is_torchs(module):
    """Whether it is one of torch's own modules, which take weights without a version as old ones."""
    return type(module).__module__.startswith("torch.nn.")


def _misshapen(own, state):
    """The names whose shapes differ. A number may be an array of one, as it was before torch 0.4."""
    return [
        name
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape and (tensor.shape or state[name].shape != (1,))
    ]


def _misfit(own, state, misshapen, missing, unexpected, trouble):
    """What is wrong, in one line."""
    if not own.keys() & state.keys():
        first, ours = next(iter(state), "nothing"), next(iter(own), "nothing")
        several = ", ".join(_beginnings(state))
        hint = f"; choose one of {printable(several)} with --checkpoint_key" if "," in several else ""
        return (
            f"does not fit, it is of another network: the file lacks {ours}{_more(own)} "
            f"and holds {printable(first)}{_more(state)}{hint}"
        )
    problems = []
    if misshapen:
        name = misshapen[0]
        shapes = f"{list(state[name].shape)} in the file but {list(own[name].shape)} in the network"
        problems.append(f"{name} is {shapes}{_more(misshapen)}")
    if missing:
        problems.append(f"the file lacks {missing[0]}{_more(missing)}")
    if unexpected:
        problems.append(f"the network lacks {printable(unexpected[0])}{_more(unexpected)}")
    return f"does not fit the architecture flags: {'; '.join(problems) or ' '.join(str(trouble).split())}"


def first_line(error: BaseException) -> str:
    """What an error says, up to the end of its first line or sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def _more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
