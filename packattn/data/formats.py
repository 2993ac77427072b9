"""The forms of a line: which of its fields are tokenized, how, and which of the tokens are targets."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple

from packattn.data.examples import READ, holds_tokens

Targets = Literal["assistant", "all"]
FORMS = (
    "input_ids (with labels or masks of the loss); messages, or conversations; prompt and completion (or response); "
    "instruction and output (and input); or a field of text"
)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
# The prompt of Taori et al., Stanford Alpaca, 2023.
_ALPACA = (
    "Below is an instruction that describes a task{further}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)
_ALPACA_FURTHER = ", paired with an input that provides further context"


class Source(NamedTuple):
    """What one line gives to the tokenizer.

    Attributes:
        used: the names of the fields that were read.
        columns: the tokens, where they need no tokenizer: name -> one number per token. Else None.
        whole: the text to tokenize.
        prompt: its beginning that is no target; None: all tokens are targets.
        chat: whether a chat template made the text, which brings its special tokens itself.
    """

    used: Sequence[str]
    columns: Mapping[str, Any] | None = None
    whole: str = ""
    prompt: str | None = None
    chat: bool = False


class Encoder:
    """Records to columns of tokens.

    The tokens are those of the tokenizer's own call, special tokens of its post-processor included, or those of
    `apply_chat_template`. Texts and completions of text end with the tokenizer's end-of-text token, which is appended
    where the tokenizer does not do so; a begin or end token that the text holds already is not doubled. Prompt and
    completion are tokenized as one text; its tokens are targets from the first one on that the prompt alone does not
    begin with.

    Args:
        tokenizer: a Hugging Face tokenizer; None where the records have input_ids.
        text: the name of the field of text.
        targets: "assistant": of conversations the turns of the assistant, which the chat template must mark by
            `{% generation %}`; of a prompt and its completion the completion. "all": every token.
        end: append the end-of-text token.
        columns: of records with input_ids, the fields to keep beside those that `PackingCollator` knows by name. None:
            all that are lists of numbers. A record without one of them is refused.
    """

    def __init__(
        self, tokenizer: Any | None, text: str = "text", targets: Targets = "assistant", end: bool = True,
        columns: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.text, self.targets, self.end, self.columns = tokenizer, text, targets, end, columns

    def source(self, record: Mapping[str, Any]) -> Source:
        """What a record, one line's object, gives to the tokenizer; fields that are null are not there.

        Raises:
            ValueError: it cannot be used, by itself, or with this tokenizer and these options.
        """
        given = {name: value for name, value in record.items() if value is not None}
        if "input_ids" in given:
            kept = self.columns
            missing = [name for name in kept or () if name not in given]
            if missing:
                raise ValueError(
                    f"lacks {', '.join(missing)}, which --columns asks for; it has {', '.join(given)}; correct the "
                    "line or --columns"
                )
            used = [
                name for name in given if name in READ or (holds_tokens(given[name]) if kept is None else name in kept)
            ]
            return Source(used, {name: given[name] for name in used})
        if self.tokenizer is None:
            raise ValueError("has no input_ids; give a tokenizer with --tokenizer")
        for name in ("messages", "conversations"):
            if name in given:
                return self._conversation(given, name)
        for asked, answer in (("prompt", "completion"), ("prompt", "response"), ("instruction", "output")):
            if asked in given and answer in given:
                return self._alpaca(given) if asked == "instruction" else self._prompted(given, asked, answer)
        if self.text in given:
            return Source([self.text], whole=_string(given, self.text))
        raise ValueError(f"must have {FORMS} {self.text!r}, got fields {', '.join(given) or 'none'}")

    def encode(self, sources: Sequence[Source]) -> list[Mapping[str, Any]]:
        """The columns of each source: input_ids, and what says which are targets. Texts take one call together."""
        columns = [source.columns or {} for source in sources]
        for chat in (False, True):
            at = [i for i, source in enumerate(sources) if source.columns is None and source.chat == chat]
            wholes = self._ids([sources[i].whole for i in at], chat, self.end)
            prompts = self._ids([sources[i].prompt or "" for i in at], chat, False)
            for i, whole, prompt in zip(at, wholes, prompts, strict=True):
                known = 0 if sources[i].prompt is None else _common(prompt, whole)
                mask = [0] * known + [1] * (len(whole) - known)
                columns[i] = {"input_ids": whole, "completion_mask": mask}
        return columns

    def _ids(self, texts: list[str], chat: bool, end: bool) -> list[list[int]]:
        """The token ids of each text; none for a text that has none but special ones."""
        if not any(texts):
            return [[] for _ in texts]
        tokenizer: Any = self.tokenizer
        options = {"add_special_tokens": not chat, "return_special_tokens_mask": True, "verbose": False}
        found = tokenizer(texts, **options)
        begins, ends = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        tokens = []
        for ids, special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
            ids = list(ids)
            tokens.append([] if all(special) and not chat else ids)
            if chat:
                continue
            if begins is not None and ids[:2] == [begins, begins]:
                del ids[0]
            if ends is not None and ids[-2:] == [ends, ends]:
                del ids[-1]
            elif end and ends is not None and ids[-1:] != [ends] and special[-1:] != [1]:
                ids.append(ends)
        return tokens

    def _conversation(self, given: Mapping[str, Any], name: str) -> Source:
        """The turns of messages or conversations, a system message of its own before them."""
        messages = _messages(name, given[name])
        used = [name, "tools", "chat_template_kwargs"]
        if isinstance(given.get("system"), str) and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": given["system"]})
            used.append("system")
        if self.targets == "all":
            return Source(used, whole=self._rendered(given, name, messages), chat=True)
        if not _MARKS.search(self._template(given)):
            raise ValueError(
                f"has {name}, and the chat template of the tokenizer does not mark the turns of the assistant by "
                "{% generation %}, so that the targets are not known; choose --targets all to learn every token, or "
                "set a template that marks them, or give prompt and completion as two lists of messages"
            )
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._applied(given, name, messages, **options)
        return Source(used, {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]})

    def _prompted(self, given: Mapping[str, Any], asked: str, answer: str) -> Source:
        """A prompt and its completion, two texts or two lists of messages."""
        used = [asked, answer]
        if not isinstance(given[asked], list) and not isinstance(given[answer], list):
            prompt, completion = _string(given, asked), _string(given, answer)
            return Source(used, whole=prompt + completion, prompt=None if self.targets == "all" else prompt)
        return self._answered(given, used, _messages(asked, given[asked]), _messages(answer, given[answer]))

    def _answered(
        self, given: Mapping[str, Any], used: list[str], asked: list[dict[str, Any]], answer: list[dict[str, Any]]
    ) -> Source:
        """The turns of a prompt and those of its completion."""
        used = [*used, "tools", "chat_template_kwargs"]
        whole = self._rendered(given, "prompt and completion", asked + answer)
        if self.targets == "all":
            return Source(used, whole=whole, chat=True)
        others = {str(message["role"]) for message in answer} - {"assistant"}
        if others:
            raise ValueError(
                f"has turns of {', '.join(sorted(others))} in its completion, of which every token is a target; give "
                "turns of the assistant alone, or all turns as messages, or choose --targets all"
            )
        bare, headed = (
            self._rendered(given, "prompt", asked, add_generation_prompt=header) for header in (False, True)
        )
        if not whole.startswith((bare, headed)):
            raise ValueError(
                "has a prompt that the chat template writes in another way where the completion follows, so that the "
                "targets are not known; give messages, or choose --targets all"
            )
        # The header of the assistant's turn is of the prompt, as far as the turn begins with it.
        shared = whole[: _common(whole, headed)]
        prompt = max(shared, bare, key=len) if whole.startswith(bare) else shared
        return Source(used, whole=whole, prompt=prompt, chat=True)

    def _alpaca(self, given: Mapping[str, Any]) -> Source:
        """Instruction, input and output: a chat where there is a template for it, else in the words of Alpaca."""
        used = ["instruction", "input", "output"]
        instruction, further, output = (_string(given, name) if name in given else "" for name in used)
        if getattr(self.tokenizer, "chat_template", None) is not None:
            asked = [{"role": "user", "content": f"{instruction}\n\n{further}" if further else instruction}]
            if isinstance(given.get("system"), str):
                asked.insert(0, {"role": "system", "content": given["system"]})
                used.append("system")
            return self._answered(given, used, asked, [{"role": "assistant", "content": output}])
        prompt = _ALPACA.format(
            further=_ALPACA_FURTHER if further else "", instruction=instruction,
            input=f"\n\n### Input:\n{further}" if further else "",
        )  # fmt: skip
        return Source(used, whole=prompt + output, prompt=None if self.targets == "all" else prompt)

    def _template(self, given: Mapping[str, Any]) -> str:
        try:
            return str(self.tokenizer.get_chat_template(None, _tools(given)))  # type: ignore[union-attr]
        except NotImplementedError:  # a tokenizer that writes conversations without a template
            return ""
        except ValueError as error:
            raise ValueError(
                "has a conversation, and the tokenizer has no chat template; set one, or choose another tokenizer"
            ) from error

    def _rendered(self, given: Mapping[str, Any], name: str, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._applied(given, name, messages, tokenize=False, **options))

    def _applied(self, given: Mapping[str, Any], name: str, messages: list[dict[str, Any]], **options: Any) -> Any:
        """What the chat template makes of messages, with the tools and the variables of the line."""
        self._template(given)
        variables = given.get("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise ValueError(f"chat_template_kwargs must be an object, got {type(variables).__name__}")
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[union-attr]
                messages, tools=_tools(given), **options, **variables
            )
        except Exception as error:  # the template is a program of its own, which can raise anything
            raise ValueError(f"{name} do not fit the chat template ({error or type(error).__name__})") from error


def _string(given: Mapping[str, Any], name: str) -> str:
    if not isinstance(given[name], str):
        raise ValueError(f"must have text as {name}, got {type(given[name]).__name__}")
    return str(given[name])


def _tools(given: Mapping[str, Any]) -> Any:
    """The tools of a line: a list of schemas, or that list as JSON text."""
    tools = given.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools must be a list of schemas, or one as JSON text ({error})") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools must be a list of schemas, got {type(tools).__name__}")
    return tools or None


def _messages(name: str, value: object) -> list[dict[str, Any]]:
    """Messages of role and content, those of ShareGPT (from and value) among them."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{name} must be a list of messages, got {'an empty one' if value == [] else type(value).__name__}"
        )
    return [_message(name, index, message) for index, message in enumerate(value)]


def _message(name: str, index: int, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT:
            raise ValueError(
                f"{name} do not fit the chat template: message {index} is from {speaker!r}, which is no role that is "
                f"known ({', '.join(_SHAREGPT)}); give it as role and content"
            )
        message = {**rest, "role": _SHAREGPT[speaker], "content": message["value"]}
    spoken = isinstance(message, dict) and "role" in message
    if not spoken or (message.get("content") is None and not message.get("tool_calls")):
        got = f"fields {', '.join(message) or 'none'}" if isinstance(message, dict) else type(message).__name__
        raise ValueError(
            f"{name} do not fit the chat template: message {index} must be an object with role and content, got {got}"
        )
    if not isinstance(message.get("content"), (str, list, NoneType)):
        raise ValueError(
            f"{name} do not fit the chat template: the content of message {index} must be text or a list of parts, got "
            f"{type(message['content']).__name__}"
        )
    if message.get("weight", 1) != 1:
        raise ValueError(
            f"{name} have a weight of {message['weight']!r} in message {index}, which cannot be kept; give prompt and "
            "completion, of which the completion is learnt, or remove the weight"
        )
    return dict(message)


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many values two sequences have in common from the begin on."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
