from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import num_calls, refused, regression
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

from camshaft.callbacks import MicroBatch
from camshaft.engine import DataError, Engine, Trainer, call_model, num_samples, prepare_batch
from camshaft.engine.batch import concatenate, tree_map

X, Y = torch.zeros(8, 3), torch.zeros(8, 1)
Pair = namedtuple("Pair", ["inputs", "target"])
Triple = namedtuple("Triple", ["left", "right", "label"])


@dataclass
class Sample:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], {"x": X, "y": Y}, {"label": Y, "image": X}, Pair(X, Y), Sample(X, Y)]
)
def test_a_batch_of_any_common_kind_splits_and_trains(batch: Any) -> None:
    inputs, target = prepare_batch(batch)
    assert inputs is X
    assert target is Y
    assert num_samples(batch) == 8
    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss())
    assert trainer.fit([batch] * 3, epochs=1)["step"] == [3]


def test_a_bare_tensor_trains_with_a_loss_of_one_argument() -> None:
    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), lambda output: output.square().mean())
    assert trainer.fit([X, (X,)], epochs=1)["step"] == [2]


def test_several_inputs_reach_the_model_by_name() -> None:
    class Two(nn.Linear):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]  # the point
            return super().forward(left + right)

    model = Two(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss())
    trainer.fit([{"left": X, "right": X, "labels": Y}, Triple(X, X, Y)], epochs=1)
    assert trainer.predict([((X, X), Y)]).shape == (8, 1)


@pytest.mark.parametrize("batch", [(X, X, Y), "text", {"label": Y}, {"x": X, "y": Y, "target": Y}, 3])
def test_a_batch_that_does_not_tell_is_refused_with_the_way_out(batch: Any) -> None:
    with pytest.raises(DataError, match="prepare_batch"):
        prepare_batch(batch)


def test_a_function_of_ones_own_splits_the_batch() -> None:
    model = nn.Linear(3, 1)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), prepare_batch=lambda batch: (batch[0], batch[2])
    )
    assert trainer.fit([(X, "note", Y)], epochs=1)["step"] == [1]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 8),
        ([[X, X], Y], 8),
        ([[torch.zeros(3, 5), torch.zeros(3, 7)], [{"boxes": X}, {"boxes": X}]], 2),
        (((torch.zeros(3, 5), torch.zeros(3, 7)), ({"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(3, 4)})), 2),
        (((X, X), Y), 8),
        ({"x": X, "name": "a"}, 8),
    ],
)
def test_the_number_of_samples_is_read_off_tensors_first(batch: Any, expected: int) -> None:
    assert num_samples(batch) == expected


@pytest.mark.parametrize("batch", [{"a": X, "b": torch.zeros(5)}, {"name": "x"}, 3, torch.zeros(())])
def test_an_unclear_number_of_samples_is_never_guessed(batch: Any) -> None:
    with pytest.raises(DataError, match="weight="):
        num_samples(batch)


def test_tree_map_keeps_the_kinds_of_containers() -> None:
    moved = tree_map(lambda tensor: tensor + 1, {"p": Pair(X, [Y]), "s": Sample(X, Y), "n": 3})
    assert isinstance(moved["p"], Pair)
    assert isinstance(moved["s"], Sample)
    assert moved["s"].x.sum() == 24
    assert moved["n"] == 3


def test_outputs_are_joined_through_containers() -> None:
    joined = concatenate([(X, {"y": Y}), (X, {"y": Y})])
    assert joined[0].shape == (16, 3)
    assert joined[1]["y"].shape == (16, 1)
    with pytest.raises(DataError, match="cannot be joined"):
        concatenate([3, 4])


@dataclass
class Labelled:
    image: Tensor
    label: Tensor


INPUTS, TARGET = torch.ones(4, 2), torch.ones(4, 1)


@pytest.mark.parametrize(
    "batch",
    [
        (INPUTS, TARGET),
        [INPUTS, TARGET],
        {"image": INPUTS, "label": TARGET},
        {"x": INPUTS, "y": TARGET},
        {"input": INPUTS, "targets": TARGET},
        Labelled(INPUTS, TARGET),
    ],
)
def test_a_list_of_batches_is_a_loader_whatever_the_batches_are(batch: Any) -> None:
    trainer = regression()
    history = trainer.fit([batch, batch], [batch], epochs=3)
    assert num_calls(trainer) == 9
    assert history["train_loss"][2] < history["train_loss"][0]


@pytest.mark.parametrize(
    ("batch", "phrase"),
    [
        ((INPUTS, TARGET, TARGET), "A batch is a tuple of 3 (Tensor [4, 2], Tensor [4, 1], Tensor [4, 1])"),
        ([], "A batch is a list of 0"),
        ({"label": TARGET}, "A batch is dict with keys label"),
        ({"x": INPUTS, "label": TARGET, "target": TARGET}, "A batch is dict with keys x, label, target"),
        ("image.png", "A batch is of type str"),
        (None, "A batch is None"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_before_the_model_sees_it(batch: Any, phrase: str) -> None:
    trainer = regression()
    with refused(DataError, phrase, "prepare_batch"):
        trainer.fit([batch], epochs=1)
    assert num_calls(trainer) == 0


def test_a_batch_of_three_works_with_a_function_that_splits_it() -> None:
    trainer = regression(prepare_batch=lambda batch: (batch[0], batch[2]))
    assert trainer.fit([(INPUTS, "names", TARGET)], epochs=2)["step"] == [1, 2]


def test_a_bare_tensor_is_a_batch_without_a_target() -> None:
    trainer = regression(loss_fn=lambda output: output.pow(2).mean())
    assert trainer.fit([INPUTS], epochs=2)["step"] == [1, 2]


def test_a_loss_that_needs_a_target_says_that_there_is_none() -> None:
    with refused(DataError, "the output, Tensor [4, 1], and the target, None"):
        regression().fit([INPUTS], epochs=1)


def test_a_number_of_samples_that_cannot_be_known_must_be_stated() -> None:
    def step(engine: Engine, batch: Mapping[str, Any]) -> dict[str, float]:
        return {"score": 0.5}

    with refused(DataError, "A batch is dict with keys text, so its number of samples cannot be known", "weight="):
        Engine(step).fit([{"text": "a b c"}], epochs=1)


def test_tensors_that_disagree_tell_no_number_of_samples() -> None:
    with refused(DataError, "(Tensor [4, 2], Tensor [3, 1]), so its number of samples cannot be known"):
        Engine(lambda engine, batch: {"score": 0.5}).fit([(INPUTS, TARGET[:3])], epochs=1)


class Sum(nn.Linear):
    """Takes two inputs of a pair, by place or by name."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]  # the point
        return super().forward(left + right)


def trainer_of(model: nn.Module) -> Engine:
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.01), nn.MSELoss())


def test_two_inputs_of_the_default_collate_reach_the_model_as_two() -> None:
    """It makes lists of nested tuples."""
    samples = [((torch.ones(3), torch.ones(3)), torch.ones(1)) for _ in range(5)]
    loader: DataLoader[Any] = DataLoader(samples, batch_size=4)  # type: ignore[arg-type]  # a list is a dataset
    trainer = trainer_of(Sum(3, 1))
    history = trainer.fit(loader, loader, epochs=2)
    assert history["val_loss"][1] < history["val_loss"][0]
    assert trainer.predict(loader).shape == (5, 1)


@pytest.mark.parametrize(
    "batch",
    [
        ([torch.zeros(3, 5, 5), torch.zeros(3, 7, 7)], [{"boxes": X}, {"boxes": X}]),
        ([torch.zeros(3, 5, 5), torch.zeros(3, 7, 7)], torch.zeros(2)),
        ([torch.zeros(3, 5, 5), torch.zeros(3, 7, 7)], [torch.zeros(3, 4), torch.zeros(3, 4)]),
        ([], torch.zeros(0)),
        (["a", "b"], torch.zeros(2)),
        ([torch.zeros(()), torch.zeros(())], torch.zeros(2)),
    ],
)
def test_a_list_with_one_item_per_sample_stays_a_list(batch: Any) -> None:
    """Detection models of torchvision take a list of images, which may be of differing sizes."""
    assert prepare_batch(batch)[0] is batch[0]
    assert call_model(lambda images: images, prepare_batch(batch)[0]) is batch[0]


class Encoding(UserDict[str, Any]):
    """A mapping that is not a dict, as transformers' BatchEncoding is."""


def test_a_mapping_that_is_not_a_dict_reaches_the_model_by_name() -> None:
    trainer = trainer_of(Sum(3, 1))
    trainer.fit([(Encoding(left=X, right=X), Y), Encoding(left=X, right=X, labels=Y)], epochs=1)
    assert trainer.step == 2


def test_a_packed_sequence_is_one_input_with_as_many_samples_as_sequences() -> None:
    class Last(nn.LSTM):
        def forward(self, packed: PackedSequence) -> Tensor:  # type: ignore[override]  # the point
            last: Tensor = super().forward(packed)[1][0][-1]
            return last

    packed = pack_sequence([torch.ones(5, 3), torch.ones(2, 3)])
    batch = (packed, torch.ones(2, 1))
    assert num_samples(batch) == num_samples(packed) == 2
    assert prepare_batch(packed) == (packed, None)
    trainer = trainer_of(Last(3, 1))
    losses = trainer.fit([batch], epochs=2)["train_loss"]
    assert losses[1] < losses[0]
    assert trainer.predict([batch]).shape == (2, 1)
    with refused(DataError, "a PackedSequence of 4", "which cannot be joined"):
        concatenate([packed, packed])
    trainer.attach(MicroBatch(2))
    with refused(DataError, "A PackedSequence cannot be divided"):
        trainer.fit([batch], epochs=1)


@pytest.mark.parametrize("kind", [OrderedDict, Encoding, lambda items: defaultdict(list, items)])
def test_tree_map_keeps_the_kinds_of_mappings(kind: Any) -> None:
    value = kind({"x": X, "more": [X, "a"]})
    moved = tree_map(lambda tensor: tensor + 1, value)
    assert type(moved) is type(value)
    assert moved["x"].sum() == moved["more"][0].sum() == 24
    assert moved["more"][1] == "a"
    assert value["x"] is X
    if isinstance(value, defaultdict):
        assert moved["new"] == []


class Fixed(Mapping[str, Any]):
    """A mapping that cannot be built from another one."""

    def __getitem__(self, name: str) -> Any:
        return {"x": X}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def test_a_mapping_that_cannot_be_built_becomes_a_dict() -> None:
    moved = tree_map(lambda tensor: tensor + 1, Fixed())
    assert type(moved) is dict
    assert moved["x"].sum() == 24
