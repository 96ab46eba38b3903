# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Between the client's messages and a backend's arrays."""

from typing import Any

import numpy as np

from vllm_generic.tink import wire
from vllm_generic.tink.backends.base import (
    Batch,
    BatchOutput,
    Datum,
    SampleOutput,
    TopK,
)
from vllm_generic.tink.errors import UserError

_DTYPES: dict[int, np.dtype[Any]] = {
    wire.FLOAT32: np.dtype("<f4"),
    wire.INT64: np.dtype("<i8"),
    wire.INT32: np.dtype("<i4"),
    wire.BFLOAT16: np.dtype("<u2"),
}


def csr_to_dense(
    values: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    shape: list[int],
    pad: int,
) -> np.ndarray:
    """A CSR tensor as an array; entries that are not listed are ``pad``."""
    if len(shape) != 2 or len(rows) != shape[0] + 1 or len(values) != len(columns):
        raise UserError(
            f"a sparse tensor of shape {shape} has {len(rows)} row pointers, "
            f"{len(columns)} columns and {len(values)} values; expected a shape of two "
            "axes, one row pointer more than rows, and as many columns as values"
        )
    counts = np.diff(rows)
    if rows[0] != 0 or rows[-1] != len(values) or (counts < 0).any():
        raise UserError(
            "a sparse tensor's row pointers do not rise from 0 to its values"
        )
    if len(columns) and not (columns.min() >= 0 and columns.max() < shape[1]):
        raise UserError(f"a sparse tensor's columns are outside its shape {shape}")
    out = np.full(shape, pad, dtype=values.dtype)
    out[np.repeat(np.arange(shape[0]), counts), columns] = values
    return out


def decode_tensor(message: Any, name: str, pad: int = 0) -> np.ndarray:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise UserError(f"loss input {name!r} has the unknown dtype {message.dtype}")
    sparse = message.WhichOneof("layout") == "sparse_csr"
    data = message.sparse_csr.values if sparse else message.dense
    try:
        values = np.frombuffer(data, dtype)
        if message.dtype == wire.BFLOAT16:
            # a bfloat16 is the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        shape = list(message.shape)
        if sparse:
            rows = np.frombuffer(message.sparse_csr.crow_indices, "<i8")
            columns = np.frombuffer(message.sparse_csr.col_indices, "<i8")
            return csr_to_dense(values, rows, columns, shape, pad)
        return values.reshape(shape) if shape else values
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"loss input {name!r} cannot be read: {error}") from None


def _decode_chunks(chunks: Any) -> np.ndarray:
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"the input has a chunk of kind {kind!r}; this service takes text only"
            )
        if len(chunk.encoded_text.tokens) % 4:
            raise UserError("a chunk's tokens are not int32")
        parts.append(np.frombuffer(chunk.encoded_text.tokens, "<i4"))
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def parse_batch(body: bytes) -> Any:
    """The ForwardBackwardRequest in a request's body."""
    request = wire.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except Exception as error:  # protobuf's own class, which differs by implementation
        raise UserError(f"the body is no ForwardBackwardRequest: {error}") from None
    return request


def decode_batch(request: Any) -> Batch:
    config = dict(request.loss_fn_config)
    for key, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") == "text":
            raise UserError(
                f"loss_fn_config[{key!r}] is the text {value.text!r}; "
                "the losses of this service take numbers"
            )
        config[key] = value.number
    data = [
        Datum(
            _decode_chunks(datum.model_input),
            {
                name: decode_tensor(tensor, name)
                for name, tensor in datum.loss_fn_inputs.items()
            },
        )
        for datum in request.data
    ]
    return Batch(data, request.loss_fn, config, request.forward_only)


def encode_batch(model_id: str, seq_id: int, batch: Batch) -> bytes:
    """The request that decode_batch reads."""
    message = wire.ForwardBackwardRequest(
        model_id=model_id,
        seq_id=seq_id,
        loss_fn=batch.loss_fn,
        loss_fn_config=dict(batch.loss_config),
        forward_only=batch.forward_only,
    )
    for datum in batch.data:
        item = message.data.add()
        tokens = datum.tokens.astype("<i4").tobytes()
        item.model_input.add().encoded_text.tokens = tokens
        for name, array in datum.loss_inputs.items():
            _write_tensor(item.loss_fn_inputs[name], array)
    return message.SerializeToString(deterministic=True)


def encode_batch_output(output: BatchOutput) -> bytes:
    """One record for each run of datums that have the same number of targets K."""
    message = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics.update(output.metrics)
    groups: list[list[np.ndarray]] = []
    for array in output.logprobs:
        if not groups or groups[-1][0].shape[1:] != array.shape[1:]:
            groups.append([])
        groups[-1].append(array)
    for group in groups:
        record = message.loss_fn_outputs.add(
            type_tag="ArrayRecord", num_datums=len(group)
        )
        field = record.fields["logprobs"]
        parts = [np.ascontiguousarray(array, "<f4") for array in group]
        field.data = b"".join(part.tobytes() for part in parts)
        sizes = [0, *(part.nbytes for part in parts)]
        field.offsets = np.cumsum(sizes, dtype="<i8").tobytes()
        field.dtype = wire.FLOAT32
        field.trailing_shape.extend(group[0].shape[1:])
    return message.SerializeToString()


def _write_topk(message: Any, topk: TopK) -> None:
    message.token_ids = np.ascontiguousarray(topk.token_ids, "<i4").tobytes()
    message.logprobs = np.ascontiguousarray(topk.logprobs, "<f4").tobytes()
    message.length, message.k = topk.token_ids.shape


def _write_tensor(message: Any, array: np.ndarray) -> None:
    floating = array.dtype.kind == "f"
    message.dtype = wire.FLOAT32 if floating else wire.INT64
    message.dense = np.ascontiguousarray(array, "<f4" if floating else "<i8").tobytes()
    message.shape.extend(array.shape)


def encode_sample_output(output: SampleOutput) -> bytes:
    message = wire.SampleResponse()
    for sequence in output.sequences:
        item = message.sequences.add()
        item.stop_reason = wire.STOP if sequence.stopped else wire.LENGTH
        item.tokens = np.asarray(sequence.tokens, "<i4").tobytes()
        item.logprobs = np.asarray(sequence.logprobs, "<f4").tobytes()
        if sequence.topk is not None:
            _write_topk(item.topk_sampled_logprobs, sequence.topk)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs.astype("<f4").tobytes()
    if output.topk_prompt is not None:
        _write_topk(message.topk_prompt_logprobs, output.topk_prompt)
    if output.target_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, output.target_logprobs)
    if output.alt_tokens is not None:
        tokens = output.alt_tokens.token_ids.astype(np.int64)
        _write_tensor(message.prompt_alt_tokens.tokens, tokens)
        _write_tensor(message.prompt_alt_tokens.logprobs, output.alt_tokens.logprobs)
    return message.SerializeToString()
