# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Messages of the protobuf package ``tinker_public``, built from a table.

The client ships its own compiled descriptors and publishes no .proto file. Field
numbers and types are the contract, so the table below is all that is needed. The
descriptors live in a pool of their own: a process may hold the client as well.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "tinker_public"

# message -> fields: (number, name, type); "*" is repeated, "?" has presence,
# "map:T" is a map from strings to T, and a fourth entry names a oneof
_MESSAGES: dict[str, list[tuple]] = {
    "EncodedText": [(1, "tokens", "bytes")],
    "Dimensions": [(1, "width", "uint32"), (2, "height", "uint32")],
    "Image": [
        (1, "data", "bytes"),
        (2, "format", "string"),
        (3, "expected_tokens", "int32?"),
        (4, "override_dimensions", "Dimensions"),
    ],
    "Dmel": [(1, "dmel", "bytes")],
    "Chunk": [
        (1, "encoded_text", "EncodedText", "chunk"),
        (2, "image", "Image", "chunk"),
        (3, "dmel", "Dmel", "chunk"),
    ],
    "Span": [
        (1, "sequence_id", "string"),
        (2, "offset", "int64"),
        (3, "length", "int64"),
    ],
    "ProvenanceSpan": [
        (1, "prompt_tokens", "Span", "span"),
        (2, "sampled_tokens", "Span", "span"),
    ],
    "SparseCsr": [
        (1, "values", "bytes"),
        (2, "crow_indices", "bytes"),
        (3, "col_indices", "bytes"),
    ],
    "Tensor": [
        (1, "dense", "bytes", "layout"),
        (2, "sparse_csr", "SparseCsr", "layout"),
        (3, "dtype", "DType"),
        (4, "shape", "int64*"),
    ],
    "Datum": [
        (1, "model_input", "Chunk*"),
        (2, "loss_fn_inputs", "map:Tensor"),
        (3, "model_input_spans", "ProvenanceSpan*"),
        (4, "loss_fn_input_spans", "ProvenanceSpan*"),
    ],
    "LossConfigValue": [
        (1, "number", "double", "value"),
        (2, "text", "string", "value"),
    ],
    "ForwardBackwardRequest": [
        (1, "model_id", "string"),
        (2, "seq_id", "int32"),
        (3, "data", "Datum*"),
        (4, "loss_fn", "string"),
        (5, "loss_fn_config", "map:double"),
        (6, "forward_only", "bool"),
        (7, "loss_fn_config_v2", "map:LossConfigValue"),
    ],
    "BatchedTensor": [
        (1, "data", "bytes"),
        (2, "offsets", "bytes"),
        (3, "dtype", "DType"),
        (4, "trailing_shape", "int64*"),
    ],
    "ArrayRecord": [
        (1, "type_tag", "string"),
        (2, "fields", "map:BatchedTensor"),
        (3, "num_datums", "int64"),
    ],
    "ForwardBackwardOutput": [
        (1, "loss_fn_output_type", "string"),
        (2, "loss_fn_outputs", "ArrayRecord*"),
        (3, "metrics", "map:double"),
    ],
    "TopkLogprobs": [
        (1, "token_ids", "bytes"),
        (2, "logprobs", "bytes"),
        (3, "k", "uint32"),
        (4, "length", "uint32"),
    ],
    "PromptAltTokens": [(1, "tokens", "Tensor"), (2, "logprobs", "Tensor")],
    "SampledSequence": [
        (1, "stop_reason", "StopReason"),
        (2, "tokens", "bytes"),
        (3, "logprobs", "bytes?"),
        (4, "topk_sampled_logprobs", "TopkLogprobs"),
    ],
    "SampleResponse": [
        (1, "sequences", "SampledSequence*"),
        (2, "prompt_logprobs", "bytes?"),
        (3, "topk_prompt_logprobs", "TopkLogprobs"),
        (4, "prompt_cache_hit_tokens", "int32"),
        (5, "target_prompt_logprobs", "Tensor"),
        (6, "prompt_alt_tokens", "PromptAltTokens"),
    ],
}
_ENUMS = {
    "DType": ["UNSPECIFIED", "FLOAT32", "INT64", "INT32", "BFLOAT16"],
    "StopReason": ["STOP", "LENGTH"],
}

_Field = descriptor_pb2.FieldDescriptorProto


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _MESSAGES:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    elif kind in _ENUMS:
        field.type = _Field.TYPE_ENUM
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")


def _add_map(
    message: descriptor_pb2.DescriptorProto,
    field: descriptor_pb2.FieldDescriptorProto,
    kind: str,
) -> None:
    """A map is a repeated message of a key and a value, nested in its message."""
    name = "".join(part.title() for part in field.name.split("_")) + "Entry"
    entry = message.nested_type.add(name=name)
    entry.options.map_entry = True
    for number, (key, of) in enumerate((("key", "string"), ("value", kind)), 1):
        member = entry.field.add(name=key, number=number, label=_Field.LABEL_OPTIONAL)
        _set_type(member, of)
    field.label = _Field.LABEL_REPEATED
    field.type = _Field.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{message.name}.{name}"


def _add_field(
    message: descriptor_pb2.DescriptorProto,
    number: int,
    name: str,
    kind: str,
    oneof: str | None = None,
) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("map:"):
        _add_map(message, field, kind.removeprefix("map:"))
        return
    if kind.endswith("*"):
        field.label = _Field.LABEL_REPEATED
    _set_type(field, kind.rstrip("*?"))
    if kind.endswith("?"):
        # proto3 writes an optional scalar as a oneof with one member
        field.proto3_optional = True
        oneof = f"_{name}"
    if oneof is not None:
        names = [declared.name for declared in message.oneof_decl]
        if oneof not in names:
            message.oneof_decl.add(name=oneof)
            names.append(oneof)
        field.oneof_index = names.index(oneof)


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="tinker_public.proto", package=PACKAGE, syntax="proto3"
    )
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=f"{name.upper()}_{value}", number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def _message(name: str) -> Any:
    descriptor = _pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
    return message_factory.GetMessageClass(descriptor)


ForwardBackwardRequest = _message("ForwardBackwardRequest")
ForwardBackwardOutput = _message("ForwardBackwardOutput")
SampleResponse = _message("SampleResponse")
Tensor = _message("Tensor")

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1
