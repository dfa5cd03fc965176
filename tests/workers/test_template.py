"""Chat templates by the conventions of Hugging Face, in the sandbox."""

from __future__ import annotations

import datetime
import json

import pytest

pytest.importorskip("jinja2")

from dynwire.errors import ConfigError
from dynwire.workers.template import ChatTemplate, TemplateRefused

MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, **more: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, **more)  # type: ignore[arg-type]


def test_messages_special_tokens_and_generation_prompt() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
    source += "{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "<s>[user]Hi>"
    assert render(source, add_generation_prompt=False) == "<s>[user]Hi"


def test_blocks_are_trimmed() -> None:
    assert render("{% if true %}\n    {% set x = 1 %}\nx\n{% endif %}\n") == "x\n"


def test_tools_and_documents() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "Grüße <&>"}}]
    assert json.loads(render("{{ tools | tojson }}", tools=tools)) == tools
    # not escaped for HTML, and not for ASCII
    assert "Grüße <&>" in render("{{ tools | tojson }}", tools=tools)
    assert render("{{ tools | tojson(indent=2) }}", tools=tools) == json.dumps(tools, indent=2, ensure_ascii=False)
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{{ documents[0].text }}", documents=[{"text": "d"}]) == "d"


def test_variables_of_the_request() -> None:
    assert render("{{ enable_thinking }}", extra={"enable_thinking": False}) == "False"
    # they do not replace what the request is about
    assert render("{{ messages[0].content }}", extra={"messages": []}) == "Hi"


def test_loop_controls_and_generation_blocks() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}a{{ messages[0].content }}{% endgeneration %}") == "aHi"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_raise_exception() -> None:
    with pytest.raises(TemplateRefused, match=r"^no such role$"):
        render("{{ raise_exception('no such role') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{{ messages[0].content + 5 }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ '%d' | format('x') }}",
    ],
)
def test_what_templates_may_not_do(source: str) -> None:
    messages: list[object] = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateRefused):
        print(ChatTemplate(source).render(messages))  # type: ignore[arg-type]
    assert messages == [{"role": "user", "content": "Hi"}]


def test_wrong_source() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}")
