"""What ``test_fsdp.py`` starts under torchrun: FSDP version 2 on two CPU processes."""

import sys
from pathlib import Path
from typing import Any

import rank_runs
import tiny_models
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from quantized_models import install_quantizers
from rank_runs import rank
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from hf_compress import GraphError, TrainingError, dimension_groups, shrink
from hf_compress.callbacks.heads import head_of
from hf_compress.callbacks.teacher import load_teacher
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.attach import attachment_of, detach_all
from hf_compress.instruments.fake_quantize import quantizable_layers, remove_fake_quantizers
from hf_compress.instruments.gate import Gate, unit_weights
from hf_compress.instruments.layer import LayerGates
from hf_compress.instruments.rewind import Rewinder
from hf_compress.instruments.sharded import reshard, unsharded, whole
from hf_compress.shrinking.apply import plain_copy

SHRUNK = ("taylor", "l2", "all")
SETTINGS = {name: each for name, each in rank_runs.SETTINGS.items() if each[1] != "lottery_ticket"}
LAYERS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}


class ShardedTrainer(Trainer):
    """On CPUs, accelerate takes no notice of FSDP and trains with DDP; otherwise nothing in it needs a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def train(folder: Path, kind: str, method: str, **args: Any) -> Trainer:
    """Evaluation before and after the last step leaves gathered copies of parameters in the modules."""
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS[kind]], "state_dict_type": "FULL_STATE_DICT"}
    options = {"fsdp": True, "fsdp_config": fsdp, "eval_strategy": "steps", "eval_steps": 2, **args}
    return rank_runs.train(folder, kind, method, trainer_class=ShardedTrainer, **options)


def shard(model: Any, units: Any) -> None:
    for module in model.modules():  # a tied head has to be in one unit with the embeddings
        if isinstance(module, units) and module is not model.get_output_embeddings():
            fully_shard(module, mesh=MESH[0])
    fully_shard(model, mesh=MESH[0])


MESH: list[Any] = []


def instrument(model: Any, groups: Any) -> list[Any]:
    """Prune and quantize a part of everything; return what was put on."""
    put: list[Any] = []
    for index, group in enumerate(groups):
        mask = torch.arange(group.num_units) % 3 != index % 3
        if group.modules:
            value = torch.tensor([0.25, 1.0])[: len(group.modules)].requires_grad_()
            put.append((LayerGates(group, model, value), value))
        else:
            gate = Gate(group, model, needs_gradient=True)
            gate.set_mask(mask)
            put.append((gate, gate.value))
    if quantizable(model):
        install_quantizers(quantizable_layers(model))
    return put


def quantizable(model: Any) -> bool:
    return any(isinstance(module, torch.nn.Linear) for module in model.base_model.modules())


def results(model: Any, inputs: dict[str, Any], put: list[Any]) -> dict[str, torch.Tensor]:
    """Return output and all gradients of one pass over the same batch on both ranks."""
    model.zero_grad()
    output = model(**inputs)
    logits = output["logits"] if "logits" in output else output[0]
    logits.square().mean().backward()
    found = {"output": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = whole(parameter.grad)
    for index, (_, value) in enumerate(put):
        found[f"gate {index}"] = value.grad.clone()
        value.grad = None
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], where: str) -> None:
    assert one.keys() == two.keys(), (where, one.keys() ^ two.keys())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{where}: {name}")


def check_instruments(name: str, before: bool, leaves: bool) -> None:
    """Instruments put on before or after sharding act as on the whole model, and come off again."""
    where = f"{name}, {'before' if before else 'after'} sharding, {'every leaf' if leaves else 'layers'}"
    make = tiny_models.ZOO[name]
    plain = make()
    inputs = make.example_inputs(plain) or make_example_inputs(plain)
    groups = [group for group in dimension_groups(plain) if group.frozen is None and not group.tied_to]
    groups = [group for group in groups if group.kind in ("heads", "ffn", "hidden", "layers")]
    assert any(group.subsets for group in groups) or name == "gpt2"
    untouched = results(plain, inputs, [])
    expected = results(plain, inputs, instrument(plain, groups))
    sharded = make()
    units = torch.nn.Linear | Conv1D | torch.nn.LayerNorm if leaves else type(layers_of(sharded)[0])
    put = instrument(sharded, groups) if before else []
    shard(sharded, units)
    put = put or instrument(sharded, groups)
    assert_same(expected, results(sharded, inputs, put), where)
    for group in groups:
        if not group.modules:
            assert torch.equal(unit_weights(sharded, group), unit_weights(plain, group)), where
    for instrumented, _ in put:
        instrumented.remove()
    remove_fake_quantizers(sharded)
    detach_all(sharded)
    assert_same(untouched, results(sharded, inputs, []), f"{where}, taken off")
    if not before:
        assert not any(attachment_of(module) for module in sharded.modules())


def layers_of(model: Any) -> Any:
    return max(
        (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)),
        key=lambda each: len(list(each.parameters())),
    )


def check_folding(name: str, layers: bool) -> None:
    """Zeros are the same bits as in the whole model, also where evaluation has left a gathered copy."""
    make = tiny_models.ZOO[name]
    plain, sharded = make(), make()
    groups = [group for group in dimension_groups(plain) if group.frozen is None and group.kind in ("heads", "ffn")]
    shard(sharded, type(layers_of(sharded)[0]) if layers else ())
    with torch.no_grad():
        sharded(**(make.example_inputs(plain) or make_example_inputs(plain)))
    for model in (plain, sharded):
        for group in groups:
            gate = Gate(group, model, needs_gradient=False)
            gate.fold(torch.arange(group.num_units) % 2 == 0)
            gate.remove()
    reshard(sharded)
    for (where, expected), parameter in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), expected), (name, where)


def check_copies(name: str) -> None:
    """A copy of a sharded model is the whole plain one, and the sharded one stays as it was."""
    make = tiny_models.ZOO[name]
    plain, sharded = make(), make()
    inputs = make.example_inputs(plain) or make_example_inputs(plain)
    shard(sharded, type(layers_of(sharded)[0]))
    if hasattr(sharded, "generate"):
        register_fsdp_forward_method(sharded, "generate")
    before = results(sharded, inputs, [])
    copied = plain_copy(sharded)
    assert [type(module) for module in copied.modules()] == [type(module) for module in plain.modules()]
    assert "generate" not in vars(copied)
    expected = plain.state_dict()
    assert expected.keys() == copied.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.state_dict().items())
    assert len(list(copied.parameters())) == len(list(plain.parameters()))  # tied weights are one still
    assert isinstance(sharded, FSDPModule)
    assert_same(before, results(sharded, inputs, []), f"{name}, after a copy was made")
    with unsharded(sharded, weights=False):
        groups = dimension_groups(sharded)
    found = {group.name: (group.num_units, group.frozen) for group in groups}
    assert found == {group.name: (group.num_units, group.frozen) for group in dimension_groups(plain)}
    try:
        dimension_groups(sharded)
    except GraphError as error:
        assert "is spread over several processes" in str(error)
    else:
        raise AssertionError("a sharded model was analyzed")


def check_teaching(folder: Path) -> None:
    """The class that FSDP swaps in says nothing of a student's head; its own does."""
    sharded = {name: tiny_models.ZOO[name]() for name in ("bert", "llama")}
    for name, model in sharded.items():
        model.save_pretrained(folder / f"teacher-{name}")  # rank 0 writes
        shard(model, ())
    dist.barrier()
    for name, model in sharded.items():
        teacher = load_teacher(str(folder / f"teacher-{name}"), model)
        assert type(teacher) is type(tiny_models.ZOO[name]())
        assert not isinstance(teacher, FSDPModule)
        assert head_of(model).shift == (name == "llama")


def check_refusals() -> None:
    """Weights that are spread over processes do not go back to earlier ones."""
    sharded = tiny_models.ZOO["bert"]()
    shard(sharded, ())
    try:
        Rewinder(sharded, None, 0, [2])
    except TrainingError as error:
        assert "sharded by FSDP" in str(error)
    else:
        raise AssertionError("a sharded model was to be rewound")


def check_resuming(folder: Path) -> None:
    """Resumed == straight, bit for bit."""
    # FSDP cannot load the state of an optimizer that has none, such as plain SGD.
    options = {**rank_runs.EQUAL, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    train(folder / "straight", "bert", "all", **options)
    train(folder / "resumed", "bert", "all", resume=str(folder / "straight" / "checkpoint-2"), **options)
    straight, resumed = rank_runs.load(folder, "straight", rank()), rank_runs.load(folder, "resumed", rank())
    compared = [name for name in straight if name.startswith(("weight.", "mask.", "step3.", "step6."))]
    assert len(compared) > 50
    assert [name for name in compared if not torch.equal(straight[name], resumed[name])] == []


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    MESH.append(init_device_mesh("cpu", (2,)))
    check_teaching(folder)
    check_refusals()
    for name in ("bert", "llama", "gpt2", "mixtral", "t5"):
        check_folding(name, layers=True)
        check_folding(name, layers=False)
        check_copies(name)
        for before in (True, False):
            for leaves in (True, False):
                check_instruments(name, before, leaves)
    for name, (kind, method, args) in SETTINGS.items():
        trainer = train(folder / name, kind, method, **args)
        assert isinstance(trainer.model, FSDPModule)
        assert all(isinstance(each, DTensor) for each in trainer.model.parameters())
        if method in SHRUNK:
            small = shrink(trainer)
            save_file(dict(small.state_dict()), folder / name / f"small{rank()}.safetensors")
    check_resuming(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
