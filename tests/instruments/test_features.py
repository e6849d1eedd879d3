import copy
import gc
import weakref

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from versions import needs_newer_transformers
from zoo import ALL, ZOO
from zoo.base import text

from hf_compress import ConfigError, TrainingError, dimension_groups, make_example_inputs
from hf_compress.instruments.attention_tap import SelfAttention
from hf_compress.instruments.features import WANTS, FeatureTap
from hf_compress.instruments.gate import Gate
from hf_compress.instruments.stacks import kept_layers, position_mask, stacks_of

MAPS = {"attentions"}
RELATIONS = {"queries", "keys", "values"}
OWN_ATTENTION = {"mpnet", "deberta_v2", "bloom"}
NO_LAYERS = {"swin", "clip", "siglip"}
NO_HIDDEN = {"clip", "siglip"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def inputs_of(name, model):
    inputs = ALL[name].example_inputs(model)
    return make_example_inputs(model) if inputs is None else inputs


def pass_through(model, inputs, wants, **options):
    tap = FeatureTap(model, wants, **options)
    return tap.read(model(**tap.prepare(inputs)))


def only_stack(features):
    (stack,) = features.stacks.values()
    return stack


def heads_of(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def test_query_key_and_value_of_bert_are_its_projections() -> None:
    model = tiny_models.bert()
    inputs = text()
    stack = only_stack(pass_through(model, inputs, RELATIONS))
    x = model(**inputs, output_hidden_states=True).hidden_states
    assert stack.num_layers == 2
    for layer, seen, given in zip(model.bert.encoder.layer, stack.attention, x, strict=False):
        own = layer.attention.self
        for projection, tensor in ((own.query, seen.query), (own.key, seen.key), (own.value, seen.value)):
            torch.testing.assert_close(tensor, heads_of(projection(given), 4))


def test_query_and_key_of_llama_are_rotated_and_not_repeated() -> None:
    model = tiny_models.llama()
    inputs = text()
    stack = only_stack(pass_through(model, inputs, RELATIONS))
    x = model(**inputs, output_hidden_states=True).hidden_states
    cos, sin = model.model.rotary_emb(x[0], torch.arange(11)[None])
    for layer, seen, given in zip(model.model.layers, stack.attention, x, strict=False):
        normed, own = layer.input_layernorm(given), layer.self_attn
        query, key = apply_rotary_pos_emb(heads_of(own.q_proj(normed), 4), heads_of(own.k_proj(normed), 2), cos, sin)
        torch.testing.assert_close(seen.query, query)
        torch.testing.assert_close(seen.key, key)
        torch.testing.assert_close(seen.value, heads_of(own.v_proj(normed), 2))
        assert seen.key.shape == (2, 2, 11, 8)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_hidden_states_are_what_each_layer_returns(name) -> None:
    model = ZOO[name]()
    inputs = inputs_of(name, model)
    if name in NO_HIDDEN:
        with pytest.raises(TrainingError, match="returned no hidden states"):
            pass_through(model, inputs, {"hidden_states"})
        return
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        features = pass_through(model, inputs, {"hidden_states"})
    assert set(features.stacks) == set(stacks_of(model))
    for stack, found in features.stacks.items():
        prefix = f"{stack}_" if len(features.stacks) > 1 else ""
        expected = plain[f"{prefix}hidden_states"][1:]
        assert found.num_layers == len(expected) == 2
        assert all(torch.equal(a, b) for a, b in zip(found.hidden, expected, strict=True))


SOFT_CAP = needs_newer_transformers("its scaled-dot-product attention passes the soft cap by, so eager maps differ")
MAPPED = sorted({*ZOO, "t5_tokens", "bart_uneven", "albert_groups", "llava"} - {"gemma2"})


@pytest.mark.parametrize("name", [*MAPPED, pytest.param("gemma2", marks=SOFT_CAP)])
def test_attention_maps_are_those_of_an_eager_copy(name) -> None:
    model = ALL[name]()
    inputs = inputs_of(name, model)
    if name in OWN_ATTENTION | NO_LAYERS:
        with pytest.raises(TrainingError, match=r"code of its own|which layer it belongs to"):
            pass_through(model, inputs, MAPS)
        return
    eager = ALL[name](attn_implementation="eager")
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True)
        for each in (model, eager):
            features = pass_through(each, inputs, MAPS)
            for stack, found in features.stacks.items():
                maps = expected[f"{stack}_attentions" if len(features.stacks) > 1 else "attentions"]
                assert found.num_layers == len(maps) >= 2
                for seen, reference in zip(found.attention, maps, strict=True):
                    torch.testing.assert_close(seen.probabilities(), reference, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "paligemma"])
def test_maps_are_what_the_fused_kernel_computed(name) -> None:
    """PaliGemma's fused attention sees later positions, its eager attention does not."""
    model = ALL[name]()
    inputs = inputs_of(name, model)
    language = model.get_decoder()
    computed = []
    for layer in language.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: computed.append(args[0]))
    seen = pass_through(model, inputs, MAPS | {"values"}).stacks["decoder"].attention
    for each, mixed in zip(seen, computed, strict=True):
        value = each.value.repeat_interleave(each.query.shape[1] // each.value.shape[1], dim=1)
        found = (each.probabilities() @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "gemma2", "whisper"])
def test_a_tap_changes_no_bit_of_outputs_and_gradients(name) -> None:
    plain, tapped = ZOO[name]().train(), ZOO[name]().train()
    inputs = inputs_of(name, plain)
    results = []
    for model in (plain, tapped):
        tap = FeatureTap(model, WANTS)
        torch.manual_seed(0)
        outputs = model(**(tap.prepare(inputs) if model is tapped else inputs))
        tap.close()
        outputs.logits.square().sum().backward()
        results.append(outputs.logits)
    assert torch.equal(*results)
    for (parameter, a), b in zip(plain.named_parameters(), tapped.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), parameter
        assert a.grad is None or torch.equal(a.grad, b.grad), parameter


def feature_loss(features):
    stacks = features.stacks.values()
    hidden = sum(x.float().square().mean() for stack in stacks for x in stack.hidden)
    seen = [each for stack in stacks for each in stack.attention]
    maps = sum(each.probabilities().square().mean() for each in seen)
    return hidden + maps + sum((x.query.mean() + x.key.square().mean() + x.value.square().mean()).float() for x in seen)


def feature_gradients(model, inputs, compiled=None):
    tap = FeatureTap(model, WANTS)
    features = tap.read((model if compiled is None else compiled)(**tap.prepare(inputs)))
    counts = {name: stack.num_layers for name, stack in features.stacks.items()}
    feature_loss(features).backward()
    assert not tap._calls  # recomputation was not taken
    return counts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "vit"])
def test_gradients_are_the_same_under_activation_checkpointing(name) -> None:
    results = []
    for checkpointing in (False, True):
        model = ZOO[name]().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = {**inputs_of(name, model), "use_cache": False} if name in ("llama", "bart", "t5") else None
        torch.manual_seed(0)
        results.append(feature_gradients(model, inputs or inputs_of(name, model)))
    (counts, expected), (checkpointed_counts, gradients) = results
    assert checkpointed_counts == counts and set(gradients) == set(expected)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


def test_gradients_of_maps_are_those_of_plain_formulas() -> None:
    """Against autograd through attention written out by hand."""
    model = tiny_models.bert()
    inputs = text()
    layer = model.bert.encoder.layer[1].attention.self
    seen = only_stack(pass_through(model, inputs, MAPS)).attention[1]
    seen.probabilities().square().sum().backward()
    gradient, layer.query.weight.grad = layer.query.weight.grad, None
    x = model(**inputs, output_hidden_states=True).hidden_states[1]
    query, key = heads_of(layer.query(x), 4), heads_of(layer.key(x), 4)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    hidden = inputs["attention_mask"][:, None, None] == 0
    scores.masked_fill(hidden, -torch.inf).softmax(-1).square().sum().backward()
    torch.testing.assert_close(gradient, layer.query.weight.grad)


@pytest.mark.parametrize("wants", [MAPS, RELATIONS])
def test_reentrant_checkpointing_is_refused_for_attention(wants) -> None:
    model = tiny_models.bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant"):
        pass_through(model, text(), wants)
    with torch.no_grad():  # a teacher needs no gradient
        assert only_stack(pass_through(model, text(), wants)).num_layers == 2
    states = only_stack(pass_through(model, text(), {"hidden_states"})).hidden
    assert all(x.requires_grad for x in states)
    FeatureTap(model, {"hidden_states"}).check_checkpointing()
    tap = FeatureTap(model, wants)
    with pytest.raises(TrainingError, match=r"attention of the encoder is wanted, but under .*use_reentrant"):
        tap.check_checkpointing()
    model.gradient_checkpointing_disable()
    tap.check_checkpointing()
    assert only_stack(pass_through(model, text(), wants)).num_layers == 2


def test_hidden_states_taken_inside_of_reentrant_checkpoints_are_refused() -> None:
    model = tiny_models.bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    tap = FeatureTap(model, {"hidden_states"})
    outputs = model(**tap.prepare(text()))
    outputs["hidden_states"] = tuple(x.detach() for x in outputs.hidden_states)
    with pytest.raises(TrainingError, match=r"no gradient.*use_reentrant"):
        tap.read(outputs)


@needs_newer_transformers("its rotary embeddings make queries and keys float32 under autocast")
def test_autocast_features_come_in_its_precision() -> None:
    model = tiny_models.llama().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = pass_through(model, text(), MAPS | {"values"})
    seen = only_stack(features).attention[0]
    assert seen.value.dtype == torch.bfloat16
    probabilities = seen.probabilities()
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 11))
    reference = only_stack(pass_through(model, text(), MAPS)).attention[0].probabilities()
    torch.testing.assert_close(probabilities, reference, rtol=0.05, atol=0.02)
    probabilities.square().sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_torch_compile_gives_the_same_features_and_gradients() -> None:
    torch._dynamo.reset()
    counts, expected = feature_gradients(tiny_models.bert(**NO_DROPOUT).train(), text())
    model = tiny_models.bert(**NO_DROPOUT).train()
    compiled_counts, gradients = feature_gradients(model, text(), torch.compile(model, backend="aot_eager"))
    assert compiled_counts == counts == {"encoder": 2}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()


def test_several_passes_before_backward_keep_their_own_features() -> None:
    model = tiny_models.bert()
    tap = FeatureTap(model, WANTS)
    batches = [text(), {"input_ids": torch.randint(5, 97, (3, 7))}]
    found = [tap.read(model(**tap.prepare(batch))) for batch in batches]
    assert [only_stack(each).attention[1].query.shape for each in found] == [(2, 4, 11, 8), (3, 4, 7, 8)]
    assert len(only_stack(found[0]).attention) == 2


def test_a_teacher_may_run_inside_of_the_students_pass() -> None:
    student, teacher = tiny_models.bert(), tiny_models.bert(num_hidden_layers=3)
    taps = FeatureTap(student, MAPS), FeatureTap(teacher, MAPS)
    given = [tap.prepare(text()) for tap in taps]
    outputs = [student(**given[0]), teacher(**given[1])]
    found = [only_stack(tap.read(each)) for tap, each in zip(taps, outputs, strict=True)]
    assert [stack.num_layers for stack in found] == [2, 3]


def test_nothing_is_left_behind_by_a_pass_or_by_an_exception() -> None:
    before = AttentionInterface.get_interface
    model = tiny_models.bert()
    tap = FeatureTap(model, WANTS)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    tap.read(model(**tap.prepare(text())))
    assert AttentionInterface.get_interface is before

    def fail(module, args):
        raise RuntimeError("boom")

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    model.register_forward_hook(lambda *_: tap.close(), always_call=True)
    with pytest.raises(RuntimeError, match="boom"):
        model(**tap.prepare(text()))
    handle.remove()
    assert AttentionInterface.get_interface is before
    assert not tap._calls
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_features_die_with_their_last_reader() -> None:
    model = tiny_models.bert()
    tap = FeatureTap(model, WANTS)
    outputs = model(**tap.prepare(text()))
    features = tap.read(outputs)
    stack = only_stack(features)
    alive = [weakref.ref(x) for x in (*stack.hidden, stack.attention[0].query, stack.attention[1].value)]
    del features, stack, outputs
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


@pytest.mark.parametrize(("wants", "kept"), [({"values"}, ["value"]), (MAPS, ["query", "key", "mask"])])
def test_only_what_is_wanted_is_kept(wants, kept) -> None:
    seen = only_stack(pass_through(tiny_models.bert(), text(), wants)).attention[0]
    names = [name for name in ("query", "key", "value", "mask") if getattr(seen, name) is not None]
    assert names == kept
    if "attentions" not in wants:
        with pytest.raises(ValueError, match="need query and key"):
            seen.probabilities()


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_only_chosen_layers_are_kept(name) -> None:
    stack = only_stack(pass_through(ZOO[name](), text(), WANTS, layers={"encoder": [1]}))
    for found in (stack.hidden, stack.attention):
        assert [each is None for each in found] == [True, False]


def test_layers_that_layerdrop_leaves_out_are_none() -> None:
    model = ZOO["bart"](encoder_layerdrop=0.5, decoder_layerdrop=0.0).train()
    model.config.use_cache = False
    inputs = inputs_of("bart", model)
    ran = []
    for index, layer in enumerate(model.model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    patterns = set()
    for seed in range(12):
        ran.clear()
        torch.manual_seed(seed)
        stack = pass_through(model, inputs, WANTS).stacks.get("encoder")
        if not ran:
            continue
        assert [x is not None for x in stack.hidden] == [index in ran for index in range(2)]
        assert [x is not None for x in stack.attention] == [index in ran for index in range(2)]
        patterns.add(tuple(ran))
    assert patterns == {(0,), (1,), (0, 1)}
    assert all(not layer._forward_pre_hooks for layer in model.model.encoder.layers)


def test_feature_maps_become_positions() -> None:
    model = ALL["convnext"]()
    inputs = make_example_inputs(model)
    stack = only_stack(pass_through(model, inputs, {"hidden_states"}))
    plain = model(**inputs, output_hidden_states=True).hidden_states[1:]
    for state, expected in zip(stack.hidden, plain, strict=True):
        assert torch.equal(state[:, 1], expected[:, :, 0, 1])
        assert state.shape == (expected.shape[0], expected.shape[2] * expected.shape[3], expected.shape[1])


def test_peft_models_give_features_with_gradients() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny_models.bert(), config)
    features = pass_through(model, text(), WANTS)
    feature_loss(features).backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4 and all(g.abs().max() > 0 for g in gradients)


def test_ddp_models_give_features_with_gradients() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_models.bert()
        expected = feature_gradients(tiny_models.bert(), text())
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert feature_gradients(model, text(), wrapped)[0] == expected[0]
        tap = FeatureTap(wrapped, WANTS)
        stack = only_stack(tap.read(wrapped(**tap.prepare(text()))))
        assert stack.attention[0].query.requires_grad and stack.hidden[1].requires_grad
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_in_a_trainer_see_every_training_pass_once(tmp_path, checkpointing) -> None:
    model = tiny_models.bert(**NO_DROPOUT)
    tap = FeatureTap(model, WANTS)
    seen = []

    def before(module, args, kwargs):
        return (args, tap.prepare(kwargs)) if module.training else None

    def after(module, args, kwargs, outputs):
        if module.training and outputs is not None:
            features = tap.read(outputs)
            seen.append(only_stack(features).num_layers)
            outputs["loss"] = outputs["loss"] + feature_loss(features)
        tap.close()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)
    data = [{"input_ids": list(range(5, 14)), "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[], use_cpu=True,
        bf16=True, gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
    assert seen == [2] * 4
    assert not tap._calls


def test_gated_models_give_the_features_of_what_they_compute() -> None:
    plain, gated = tiny_models.bert(), tiny_models.bert()
    for group in dimension_groups(gated):
        if group.kind in ("heads", "layers") and group.frozen is None:
            Gate(group, gated, needs_gradient=True)
    expected = only_stack(pass_through(plain, text(), WANTS))
    found = only_stack(pass_through(gated, text(), WANTS))
    for a, b in zip(found.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(found.attention, expected.attention, strict=True):
        torch.testing.assert_close(a.probabilities(), b.probabilities())


@pytest.mark.parametrize("name", ["bert_three_layers", "t5_gated_three_layers"])
def test_kept_layers_follow_the_gates(name) -> None:
    model = ALL[name]()
    assert kept_layers(model, "encoder", 3) == [True] * 3
    for group in dimension_groups(model):
        if group.kind == "layers" and group.frozen is None:
            gate = Gate(group, model, needs_gradient=False)
            if group.num_units == 3:
                gate.set_mask(torch.tensor([True, False, True]))
    assert kept_layers(model, "encoder", 3) == [True, False, True]
    if "decoder" in stacks_of(model):
        assert kept_layers(model, "decoder", 2) == [True, True]
    with pytest.raises(TrainingError, match="one of 3 layers"):
        kept_layers(model, "encoder", 4)


def test_a_masked_layer_returns_its_input() -> None:
    model = tiny_models.bert()
    group = next(group for group in dimension_groups(model) if group.kind == "layers")
    Gate(group, model, needs_gradient=False).set_mask(torch.tensor([True, False]))
    stack = only_stack(pass_through(model, text(), {"hidden_states"}))
    torch.testing.assert_close(stack.hidden[1], stack.hidden[0])
    assert kept_layers(model, "encoder", 2) == [True, False]


def test_position_masks_of_text() -> None:
    model, inputs = tiny_models.bert(), text()
    like = torch.zeros(2, 11, 32)
    assert torch.equal(position_mask(model, "encoder", inputs, like), inputs["attention_mask"].bool())
    assert position_mask(model, "encoder", {}, like).all()
    with pytest.raises(TrainingError, match=r"attention_mask has shape \[2, 1, 11, 11\]"):
        position_mask(model, "encoder", {"attention_mask": torch.ones(2, 1, 11, 11)}, like)
    with pytest.raises(TrainingError, match=r"has shape \[2, 9\].*\[2, 11\]"):
        position_mask(model, "encoder", {"attention_mask": torch.ones(2, 9)}, like)


def test_position_masks_of_decoders() -> None:
    model, like = tiny_models.t5(), torch.zeros(2, 5, 32)
    labels = torch.tensor([[3, 4, 5, -100, -100], [3, 4, 5, 6, -100]])
    given = {"attention_mask": torch.ones(2, 11), "labels": labels}
    assert torch.equal(position_mask(model, "decoder", given, like), labels != -100)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(position_mask(model, "decoder", {**given, "decoder_attention_mask": mask}, like), mask.bool())
    assert position_mask(model, "decoder", {}, like).all()
    assert position_mask(model, "encoder", given, torch.zeros(2, 11, 32)).shape == (2, 11)


@pytest.mark.parametrize(("name", "samples"), [("wav2vec2", 380), ("whisper", 30)])
def test_position_masks_of_speech_count_frames(name, samples) -> None:
    model = ZOO[name]()
    like = pass_through(model, inputs_of(name, model), {"hidden_states"}).stacks["encoder"].hidden[0]
    mask = torch.ones(2, samples, dtype=torch.long)
    mask[1, samples // 2 :] = 0
    found = position_mask(model, "encoder", {"attention_mask": mask}, like)
    source = next(m for m in model.modules() if hasattr(m, "_get_feat_extract_output_lengths"))
    lengths = source._get_feat_extract_output_lengths(mask.sum(-1))
    assert found.sum(-1).tolist() == lengths.tolist()
    assert found[0].all() and not found[1].all()


def test_what_cannot_be_taken_is_refused_with_a_remedy() -> None:
    model = tiny_models.bert()
    with pytest.raises(ConfigError, match="'hidden_state' is unknown; closest match: 'hidden_states'"):
        FeatureTap(model, {"hidden_state"})
    with pytest.raises(ConfigError, match="nothing was given"):
        FeatureTap(model, set())
    with pytest.raises(TrainingError, match="no PreTrainedModel"):
        FeatureTap(nn.Linear(2, 2), WANTS)
    with pytest.raises(TrainingError, match="return_dict=False"):
        FeatureTap(model, WANTS).prepare({"return_dict": False})
    tap = FeatureTap(model, {"hidden_states"})
    with pytest.raises(TrainingError, match="returned no hidden states"):
        tap.read(model(**text()))
    silent = copy.deepcopy(model)
    silent.__class__ = type("Silent", (type(model),), {"forward": lambda self, input_ids: None})
    with pytest.raises(TrainingError, match="takes no output_hidden_states"):
        FeatureTap(silent, {"hidden_states"})


def test_other_attention_implementations_are_refused() -> None:
    def own(module, query, key, value, mask, **kwargs):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    before = AttentionInterface.get_interface
    AttentionInterface.register("a_test", own)
    try:
        model = tiny_models.bert(attn_implementation="a_test")
        with pytest.raises(TrainingError, match=r"'a_test'.*attn_implementation='sdpa'"):
            pass_through(model, text(), MAPS)
        assert AttentionInterface.get_interface is before
    finally:
        AttentionInterface._global_mapping.pop("a_test")


def test_sinks_are_refused_for_maps_only() -> None:
    model = ALL["gpt_oss"]()
    with pytest.raises(TrainingError, match="sinks"):
        pass_through(model, text(), MAPS)
    assert only_stack(pass_through(model, text(), RELATIONS)).attention[1].value is not None


def test_a_query_that_may_attend_to_nothing_attends_to_everything() -> None:
    x = torch.randn(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    for given in (mask, torch.zeros(1, 1, 3, 3).masked_fill(~mask, -torch.inf)):
        maps = SelfAttention(x, x, None, 0.5, given, None, False, None, True, nn.Identity(), 2, 4).probabilities()
        torch.testing.assert_close(maps[:, :, 1], torch.full((1, 2, 3), 1 / 3))
        torch.testing.assert_close(maps[0, 0, 0], (x[0, 0, 0] @ x[0, 0].T * 0.5).softmax(-1))


def test_choices_of_an_example_have_masks_of_their_own() -> None:
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 1, 1]]])
    found = position_mask(tiny_models.bert(), "encoder", {"attention_mask": mask}, torch.zeros(4, 3, 2))
    assert torch.equal(found, mask.flatten(0, 1).bool())
