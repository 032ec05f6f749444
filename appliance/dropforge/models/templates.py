"""Chat templates by name, written from each family's published prompt format, in Jinja that llama.cpp runs too."""

from __future__ import annotations

from dataclasses import dataclass

# No default system message, no trimming: what the user wrote is what the model sees, so that answers can be found
# again.
_CHATML_TURNS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """One chat template: the Jinja text, the marker that ends a turn, and the markers that must be single tokens."""

    name: str
    text: str
    end_of_turn: str
    markers: tuple[str, ...]


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="chatml", text=_CHATML_TURNS, end_of_turn="<|im_end|>", markers=("<|im_start|>", "<|im_end|>")),
        Template(
            name="chatml-bos",
            text="{{ bos_token }}" + _CHATML_TURNS,
            end_of_turn="<|im_end|>",
            markers=("<|im_start|>", "<|im_end|>"),
        ),
    )
}
