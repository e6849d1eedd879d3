"""Which layer of the teacher each layer of the student learns from, where that is fixed before training.

Layers are counted from 0. Pairs are (student layer, teacher layer), in the order of the student's layers.
"""

from collections.abc import Callable, Mapping

from hf_compress.errors import ConfigError, choices

Pairs = tuple[tuple[int, int], ...]


def pair_layers(how: str | Mapping[int, int], num_student: int, num_teacher: int) -> Pairs:
    """Return the pairs of a rule in ``RULES``, or those given as {student layer: teacher layer}.

    Args:
        how: Name of the rule, or the pairs; negative layers count from the end.
        num_student: Layers of the student.
        num_teacher: Layers of the teacher.

    Returns:
        One pair for every student layer that takes part.

    Raises:
        ConfigError: If the rule is unknown or does not fit these numbers, or if a layer does not exist.
    """
    _check_depth("student", num_student)
    _check_depth("teacher", num_teacher)
    if isinstance(how, Mapping):
        return _given(how, num_student, num_teacher)
    if how not in RULES:
        raise ConfigError(f"layer pairing: unknown rule {how!r}; {choices(how, RULES)}; or {{student: teacher}}.")
    return RULES[how](num_student, num_teacher)


def same(num_student: int, num_teacher: int) -> Pairs:
    """Pair layer i with layer i.

    Raises:
        ConfigError: If the depths differ.
    """
    if num_student != num_teacher:
        raise ConfigError(
            f"layer pairing 'same': the student has {num_student} layers, the teacher {num_teacher}; it needs equal "
            "depths. Use 'uniform', 'last', or say {student: teacher}."
        )
    return tuple((layer, layer) for layer in range(num_student))


def uniform(num_student: int, num_teacher: int) -> Pairs:
    """Pair student layer i with teacher layer (i + 1) * num_teacher / num_student - 1, rounded half up.

    Layers of the teacher are spaced equally, and last is paired with last.

    Source: Sun et al. 2019, Patient KD, arXiv:1908.09355, section 3.2, "PKD-Skip", the last layer included.
    """
    nearest = ((2 * (layer + 1) * num_teacher + num_student) // (2 * num_student) for layer in range(num_student))
    return tuple((layer, max(number, 1) - 1) for layer, number in enumerate(nearest))


def last(num_student: int, num_teacher: int) -> Pairs:
    """Pair the last layers only."""
    return ((num_student - 1, num_teacher - 1),)


RULES: dict[str, Callable[[int, int], Pairs]] = {"same": same, "uniform": uniform, "last": last}
"""Name -> rule; each takes the number of layers of student and teacher."""


def find_layer(whose: str, layer: int, number: int) -> int:
    """Return a layer counted from 0; a negative one counts from the end.

    Raises:
        ConfigError: If it does not exist.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not -number <= layer < number:
        raise ConfigError(
            f"layer pairing: the {whose} has {number} layers, and no layer {layer!r}; allowed: ints from {-number} to "
            f"{number - 1}."
        )
    return layer % number


def find_student_layers(layers: Mapping[int, object], number: int) -> dict[int, int]:
    """Return {layer as given: layer counted from 0}, in the order of the layers.

    Raises:
        ConfigError: If there is none, if one does not exist, or if two are the same.
    """
    if not layers:
        raise ConfigError("layer pairing: no layers are given; say {student: teacher} for one at least.")
    found = {given: find_layer("student", given, number) for given in layers}
    if len(set(found.values())) < len(found):
        raise ConfigError(
            f"layer pairing: a student layer is given twice, as in {{-1: 0, {number - 1}: 0}}: {list(layers)}."
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _given(pairs: Mapping[int, int], num_student: int, num_teacher: int) -> Pairs:
    students = find_student_layers(pairs, num_student)
    return tuple((student, find_layer("teacher", pairs[given], num_teacher)) for given, student in students.items())


def _check_depth(whose: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"layer pairing: the {whose} has {number!r} layers; it needs one at least.")
