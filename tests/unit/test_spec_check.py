"""From bytes to a checked, resolved spec: defaults, messages, limits."""

from __future__ import annotations

import time

import pytest
from dropforge import spec_check
from dropforge.errors import SpecError
from dropforge.spec_check import check, check_in_child, to_yaml
from dropforge.spec_defaults import resolve
from dropforge.spec_file import parse
from hypothesis import given
from hypothesis import strategies as st

MINIMAL = "version: 1\nname: n\nmodel: builtin:tiny-llama\ndata: t.jsonl\nexport: [merged]\n"
FULL = """version: 1
name: support-bot
model: {id: Qwen/Qwen3-4B, revision: abc123, quantization: nf4, max_seq_length: 8192, remote_code: false}
method: sft
adapter: {type: lora, r: 16, lora_alpha: 16, lora_dropout: 0, target_modules: all-linear, use_rslora: false}
data:
  train: [{path: tickets.jsonl, weight: 2}, {path: yahma/alpaca-cleaned, split: "train[:2000]"}]
  eval: {fraction: 0.02}
  format: {columns: {prompt: "Capital of {Country}?[[ On the {River}?]]", response: Answer}}
  template: auto
  train_on: responses
  packing: auto
train: {num_train_epochs: 1, learning_rate: 2e-4, effective_batch_size: 16, lr_scheduler_type: linear, warmup_ratio: 0.05, seed: 3407,
        early_stopping: {patience: 3}, save_minutes: 10, on_oom: fail}
resources: {gpus: 1, priority: 50, time_limit: 12h}
report_to: []
export: [adapter, merged, "gguf:q4_k_m,q8_0", ollama]
"""


def read(text: str):
    return check(text.encode(), filename="job.yaml")


def problems(text: str):
    with pytest.raises(SpecError) as caught:
        read(text)
    return caught.value.problems


def with_line(line: str) -> str:
    return MINIMAL.replace("export:", f"{line}\nexport:")


def test_the_full_form_of_the_design_is_valid():
    spec = read(FULL).resolved
    assert spec.resources.time_limit == 12 * 3600
    assert spec.export == ("adapter", "merged", "gguf:q4_k_m", "gguf:q8_0", "ollama")
    assert spec.data.train[1].split == "train[:2000]"


def test_defaults_are_filled_and_resolving_twice_changes_nothing():
    spec = read(MINIMAL).resolved
    train = spec.train
    assert (train.learning_rate, train.num_train_epochs, train.seed, train.optim) == (2e-4, 1.0, 3407, "adamw_8bit")
    assert (train.effective_batch_size, train.per_device_train_batch_size, train.gradient_accumulation_steps) == (
        16,
        8,
        2,
    )
    assert (spec.adapter.r, spec.adapter.lora_alpha) == (16, 16)
    assert resolve(spec) == spec


@pytest.mark.parametrize(
    ("line", "rate"),
    [("method: cpt", 5e-5), ("adapter: {type: full}", 2e-5), ("train: {learning_rate: 1e-3}", 1e-3)],
)  # fmt: skip
def test_learning_rate_by_method(line, rate):
    assert read(with_line(line)).resolved.train.learning_rate == pytest.approx(rate)


def test_cpt_learns_everything():
    assert read(with_line("method: cpt")).resolved.data.train_on == "everything"


@pytest.mark.parametrize("field", ["beta: 0.1", "num_generations: 4", "temperature: 1"])
def test_a_training_field_that_nothing_reads_yet_is_refused_not_ignored(field):
    (found,) = problems(with_line(f"train: {{{field}}}"))
    assert found.code == "not-in-this-release"
    assert field.split(":")[0] in found.where


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ("effective_batch_size: 6", (6, 2, 3)), ("per_device_train_batch_size: 3", (3, 3, 1)),
        ("gradient_accumulation_steps: 5", (5, 1, 5)), ("effective_batch_size: 12, gradient_accumulation_steps: 4", (12, 3, 4)),
        ("per_device_train_batch_size: 2, gradient_accumulation_steps: 4", (8, 2, 4)), ("effective_batch_size: 7", (7, 1, 7)),
    ],
)  # fmt: skip
def test_batch_numbers_always_agree(batch, expected):
    train = read(with_line(f"train: {{{batch}}}")).resolved.train
    assert (
        train.effective_batch_size,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    ) == expected


def test_the_resolved_yaml_reads_back_equal():
    spec = read(FULL).resolved
    assert check(to_yaml(spec).encode(), filename="spec.resolved.yaml").spec == spec


TEXT = st.text(alphabet=" \n\t#:-,&*!|>%@`'\"{}[]1e5no~ß\\", min_size=1)


@given(value=st.recursive(TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
                          lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just("key"), inner, max_size=3),
                          max_leaves=8))  # fmt: skip
def test_any_value_survives_the_yaml(value):
    """Written entry by entry, at any depth."""
    text = spec_check._block({"key": {"deeper": value, "and": value}})
    assert parse(text.encode(), filename="a.yaml").value == {"key": {"deeper": value, "and": value}}


def test_strings_that_look_like_other_types_survive_the_yaml():
    spec = read(with_line("data.x: 1").replace("data.x: 1", "rerun: false").replace("name: n", 'name: "1e5"')).resolved
    assert check(to_yaml(spec).encode(), filename="a.yaml").spec.name == "1e5"


@pytest.mark.parametrize(
    ("line", "code", "says", "helps"),
    [
        ("train: {learning_rte: 1}", "spec-unknown-key", "learning_rte", "'learning_rate'"),
        ("adaptr: {r: 8}", "spec-unknown-key", "adaptr", "'adapter'"),
        ("train: {learning_rate: fast}", "spec-value", "train.learning_rate", ""),
        ("train: {seed: '3'}", "spec-value", "train.seed", ""),
        ("train: {learning_rate: true}", "spec-value", "train.learning_rate", ""),
        ("train: {learning_rate: -1}", "spec-value", "greater than 0", ""),
        ("train: {optim: adamw8bit}", "spec-value", "adamw8bit", "'adamw_8bit'"),
        ("adapter: {type: lorra}", "spec-value", "lorra", "'lora'"),
        ("resources: {time_limit: soon}", "spec-value", "time_limit", ""),
        ("train: {warmup_ratio: 0.1, warmup_steps: 3}", "spec-value", "not both", ""),
        ("train: {early_stopping: {patience: 2}}", "spec-value", "data.eval", ""),
        ("train: {effective_batch_size: 5, per_device_train_batch_size: 2}", "spec-value", "multiple", ""),
        ("publish: {hub: {repo: me/x, token: hf_secret}}", "spec-unknown-key", "token", "known keys"),
        ("env: {A: b}", "spec-unknown-key", "env", ""),
        ("output_dir: /tmp/x", "spec-unknown-key", "output_dir", ""),
    ],
)  # fmt: skip
def test_a_wrong_line_is_explained(line, code, says, helps):
    (found,) = problems(with_line(line))
    assert found.code == code
    assert says in found.what
    assert helps in found.fix
    assert "line 5" in found.where or "the whole spec" in found.where


def test_all_problems_come_at_once():
    found = problems("version: 2\nname: ''\nmodel: a/b\ndata: {train: [], formt: x}\ntrain: {seed: x}\n")
    text = "\n".join(map(str, found))
    for part in ("version", "name", "formt", "seed", "'export' is missing"):
        assert part in text, text


def test_an_unknown_builtin_model_names_the_nearest():
    (found,) = problems(MINIMAL.replace("tiny-llama", "tiny-lama"))
    assert found.code == "model-unknown-builtin"
    assert "builtin:tiny-llama" in found.fix


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jsonl", "a/../../x", "~/x", "C:/x", "a\\\\b", "x\\u0000y", ""])
def test_dangerous_paths_are_refused(path):
    (found, *_) = problems(MINIMAL.replace("t.jsonl", f'"{path}"'))
    assert found.code in ("spec-value", "spec-binary")


@pytest.mark.parametrize("model", ["/models/x", "../x", "./x", "~/x", "a b", "builtin:", "http://x/y"])
def test_dangerous_models_are_refused(model):
    assert problems(MINIMAL.replace("builtin:tiny-llama", f'"{model}"'))[0].code == "spec-value"


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("method: dpo", "0.3"), ("method: grpo", "0.4"), ("report_to: [wandb]", "0.2"),
        ("resources: {gpus: 2}", "0.3"), ("train: {on_oom: shrink}", "0.2"),
    ],
)  # fmt: skip
def test_what_comes_later_names_its_release(line, release):
    text = MINIMAL.replace("data: t.jsonl\n", "") if line.startswith("data") else MINIMAL
    (found,) = problems(text.replace("export:", f"{line}\nexport:"))
    assert found.code == "not-in-this-release"
    assert f"release {release}" in found.what


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_change_the_base_need_plain_weights(init):
    line = f"adapter: {{init_lora_weights: {init}}}\nexport:"
    assert read(MINIMAL.replace("export:", line)).spec.adapter.init_lora_weights == init
    quantized = MINIMAL.replace("builtin:tiny-llama", "{id: a/b, quantization: nf4}").replace("export:", line)
    assert [(found.code, found.where) for found in problems(quantized)] == [
        ("not-in-this-release", "adapter.init_lora_weights")
    ]


def test_loftq_needs_weights_in_4_bits():
    line = "adapter: {init_lora_weights: loftq}\nexport:"
    (found,) = problems(MINIMAL.replace("export:", line))
    assert found.code == "spec-value" and "needs model.quantization: nf4" in found.what + found.why
    quantized = MINIMAL.replace("builtin:tiny-llama", "{id: a/b, quantization: nf4}").replace("export:", line)
    assert read(quantized).spec.adapter.init_lora_weights == "loftq"


@pytest.mark.parametrize(("entry", "code"), [("torchao", "not-in-this-release"), ("fp8:x", "spec-value"), ("gguf:q8_0:2", "spec-value"),
                                             ("gguf", "spec-value"), ("gguf:q9", "spec-value"), ("merged:x", "spec-value"),
                                             ("onnx", "spec-value")])  # fmt: skip
def test_exports_are_checked(entry, code):
    assert problems(MINIMAL.replace("[merged]", f'["{entry}"]'))[0].code == code


@pytest.mark.parametrize(("short", "long"), [("gguf:quantized", "gguf:q4_k_m"), ("gguf:fast_quantized", "gguf:q8_0"),
                                             ("gguf:Q8_0", "gguf:q8_0"), ("gguf:not_quantized", "gguf:f16")])  # fmt: skip
def test_export_aliases(short, long):
    assert read(MINIMAL.replace("[merged]", f"[{short}]")).spec.export == (long,)


def test_full_fine_tuning_needs_plain_weights():
    text = MINIMAL.replace("builtin:tiny-llama", "{id: a/b, quantization: nf4}").replace(
        "export", "adapter: {type: full}\nexport"
    )
    assert "cannot take" in problems(text)[0].what


def test_every_proper_prefix_is_refused_or_complete():
    """A half-copied file must not start a wrong job: `export` is required and comes last."""
    raw = FULL.encode()
    last_key = raw.index(b"export:")
    for end in range(len(raw)):
        try:
            checked = check(raw[:end], filename="job.yaml")
        except SpecError:
            continue
        assert end > last_key, raw[:end]
        assert checked.spec.export, "an export list that is empty must not validate"


def test_the_child_gives_the_same_answer_and_the_same_errors():
    here, there = read(FULL), check_in_child(FULL.encode(), filename="job.yaml")
    assert there.resolved == here.resolved
    with pytest.raises(SpecError) as caught:
        check_in_child(with_line("train: {seed: x}").encode(), filename="job.yaml")
    assert caught.value.problems == problems(with_line("train: {seed: x}"))


@pytest.mark.parametrize("raw", [b"[" * 200_000, b"{" * 200_000, b"a: " + b"- " * 100_000, b"\x00" * 1000])
def test_hostile_bytes_are_refused_quickly(raw):
    started = time.monotonic()
    with pytest.raises(SpecError):
        check_in_child(raw, filename="bomb.yaml")
    assert time.monotonic() - started < 10
