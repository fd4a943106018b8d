"""What a block has changed is put back into the same objects."""

from __future__ import annotations

import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from camshaft.engine import EngineStateError
from camshaft.engine.put_back import put_back

counted: list[int] = []
number = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    values: list[int] = field(default_factory=list)
    own: int = 1


class Slots:
    __slots__ = ("__hidden", "later", "shown")

    def __init__(self) -> None:
        self.shown, self.__hidden = [1], 2

    def hidden(self) -> int:
        return self.__hidden

    def hide(self, value: int) -> None:
        self.__hidden = value


CONTAINERS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "list": ([1, [2]], lambda one: (one[1].append(3), one.clear())),
    "dict": ({"a": 1, "b": [2]}, lambda one: (one["b"].append(3), one.pop("a"), one.update(c=4))),
    "the order of a dict": ({"a": 1, "b": 2}, lambda one: one.update(a=one.pop("a"))),
    "OrderedDict": (OrderedDict(a=1, b=2), lambda one: one.move_to_end("a")),
    "defaultdict": (defaultdict(list, {1: [1]}), lambda one: (one[2].append(1), one[1].append(2))),
    "Counter": (Counter("aab"), lambda one: one.update("abc")),
    "set": ({1, 2}, lambda one: (one.add(3), one.remove(1))),
    "deque": (deque([1, 2], maxlen=2), lambda one: one.append(3)),
    "array": (np.arange(3), lambda one: one.__setitem__(0, 9)),
    "a list in a tuple": (([1], 2), lambda one: one[0].append(2)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_the_same_object_with_the_same_content(name: str) -> None:
    owner, change = CONTAINERS[name]
    before = repr(owner)
    items = list(owner)
    with put_back(owner):
        change(owner)
        assert repr(owner) != before
    assert repr(owner) == before
    assert all(one is other for one, other in zip(owner, items, strict=True)) or name == "array"


def test_attributes_slots_and_frozen_dataclasses() -> None:
    class Plain:
        def __init__(self) -> None:
            self.values, self.removed = [1], 1

    plain, slots, frozen = Plain(), Slots(), Frozen()
    values = plain.values
    with put_back([plain, slots, frozen]):
        plain.values.append(2)
        plain.values = []
        plain.added = 1  # type: ignore[attr-defined]
        del plain.removed
        slots.shown.append(2)
        setattr(slots, "later", 3)  # noqa: B010 - only its name is known
        slots.hide(4)
        frozen.values.append(1)
        object.__setattr__(frozen, "own", 2)
    assert plain.__dict__ == {"values": [1], "removed": 1}
    assert plain.values is values
    assert (slots.shown, slots.hidden(), hasattr(slots, "later")) == ([1], 2, False)
    assert (frozen.values, frozen.own) == ([], 1)


def test_what_functions_keep_from_around_them() -> None:
    def counter() -> Callable[[], int]:
        calls, seen = 0, list[int]()

        def call(default: list[int] = [0]) -> int:  # noqa: B006 - it is what is tested
            nonlocal calls
            calls += 1
            seen.append(calls)
            default.append(calls)
            return len(seen) + len(default)

        return call

    call = counter()
    assert call() == 3
    with put_back({"handler": call, "bound": [].append}):
        call()
        call()
    assert call() == 5


def test_the_global_variables_that_a_users_function_names() -> None:
    def count() -> None:
        global number
        counted.append(1)
        number += 1

    with put_back(count):
        count()
        assert (counted, number) == ([1], 1)
    assert (counted, number) == ([], 0)


def test_a_cycle_and_an_object_that_is_reached_twice() -> None:
    one: dict[str, Any] = {"values": [1]}
    one["self"] = one
    other = [one, one["values"]]
    with put_back(other):
        one["values"].append(2)
        del one["self"]
    assert one["self"] is one
    assert one["values"] == [1]


def test_tensors_with_their_memory_gradients_and_attributes() -> None:
    linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    model = nn.Sequential(linear, norm)
    weight, before = linear.weight, [one.clone() for one in model.state_dict().values()]
    row, earlier = weight.data[0], torch.ones(2, 2)
    weight.grad = earlier
    pointer = weight.data_ptr()
    with put_back(model):
        weight.data = torch.zeros(3, 3, dtype=torch.float64)  # as when it is moved to another device
        linear.bias.data.mul_(2)
        linear.bias.requires_grad_(False)
        norm(torch.randn(4, 2))
        earlier += 1
        row += 1
        weight.grad = None
        model.extra = nn.Linear(1, 1)
        setattr(weight, "note", 1)  # noqa: B010
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", *list(model.state_dict())[4:]]
    assert (weight.data_ptr(), weight.grad is earlier, linear.bias.requires_grad) == (pointer, True, True)
    assert torch.equal(earlier, torch.ones(2, 2))
    assert torch.equal(row, weight[0])
    assert not hasattr(weight, "note")


def test_tensors_that_share_memory_are_copied_once_and_still_share_it() -> None:
    whole = torch.arange(6.0)
    first, second = whole[:4], whole[2:]
    with put_back([first, second]):
        whole.zero_()
    assert torch.equal(whole, torch.arange(6.0))
    first[3] = 9
    assert second[1] == 9


@pytest.mark.parametrize(
    "made", [torch.eye(2).to_sparse, lambda: torch.zeros(0), lambda: torch.empty(2, device="meta")]
)
def test_tensors_of_other_kinds(made: Callable[[], Tensor]) -> None:
    tensor = made()
    before = tensor.clone()
    with put_back([tensor]):
        if tensor.is_sparse:
            tensor._values().zero_()
    if tensor.device.type != "meta":
        assert torch.equal(tensor.to_dense(), before.to_dense())


def test_a_layer_whose_shape_is_known_at_its_first_batch() -> None:
    model = nn.LazyLinear(2)
    with put_back(model):
        model(torch.zeros(1, 3))
        assert type(model) is nn.Linear
    assert type(model) is nn.LazyLinear
    assert isinstance(model.weight, nn.UninitializedParameter)
    assert model(torch.zeros(1, 4)).shape == (1, 2)


def test_optimizers_and_schedulers() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def train(num: int) -> list[Tensor]:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for _ in range(num):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
        return [one.clone() for one in model.parameters()]

    train(1)
    with put_back(model, optimizer):
        once = train(3)
    assert all(map(torch.equal, train(3), once))
    assert optimizer.param_groups[0]["lr"] != 0.1


def test_random_generators_the_global_ones_too() -> None:
    own = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, sampler=RandomSampler(data, generator=own))
    held = {"random": random.Random(1), "new": np.random.default_rng(1), "old": np.random.RandomState(1)}

    def draw() -> list[Any]:
        numbers = [random.random(), np.random.rand(), torch.rand(1).item(), [int(one) for (one,) in loader]]
        return [*numbers, *(one.random() if name != "old" else one.rand() for name, one in held.items())]  # type: ignore[attr-defined]

    with put_back(loader, held):
        once = draw()
        assert draw() != once
    assert draw() == once


class Augmented(Dataset[Tensor]):
    """A data set with a generator of its own, and many samples."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.names = [[str(one)] for one in range(2000)]
        self.values = torch.zeros(2000)
        self.num_read = 0

    def __getitem__(self, index: int) -> Tensor:
        self.num_read += 1
        return self.values[index] + float(self.generator.random())

    def __len__(self) -> int:
        return len(self.names)


def test_of_a_data_set_its_counters_and_generators_and_not_its_samples() -> None:
    from camshaft.engine.put_back import _contents

    data = Augmented()
    with put_back(DataLoader(data)):
        once = data[0]
    assert data.num_read == 0
    assert torch.equal(data[0], once)
    owners = [content.owner for content in _contents([data])]
    assert not any(one is data.values or one is data.names or one is data.names[0] for one in owners)
    samples = [(torch.zeros(1), 0)]
    owners = [content.owner for content in _contents([DataLoader(samples)])]  # type: ignore[arg-type]  # a list serves
    assert not any(one is samples[0][0] for one in owners)


def test_it_is_put_back_after_an_error_also_of_the_keyboard() -> None:
    numbers = [1]

    def fail(kind: type[BaseException]) -> None:
        with put_back(numbers):
            numbers.append(2)
            raise kind

    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind):
            fail(kind)
        assert numbers == [1]


def test_threads_files_and_modules_are_left_alone() -> None:
    with open(__file__) as file:
        held = [threading.Thread(), threading.Lock(), threading, file, torch.float32, deque, iter([1])]
        with put_back(held):
            held.append(1)
    assert len(held) == 7


def test_what_cannot_be_put_back_is_said() -> None:
    class Stubborn(dict[str, int]):
        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            return {"always": object()}

    with refused(EngineStateError, "Stubborn", "could not be put back"), put_back(Stubborn()):
        pass
