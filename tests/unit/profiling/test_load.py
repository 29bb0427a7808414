"""What a client makes of an event stream."""

import json

import httpx
import pytest

from pals_ray.profiling.load import event_lines

#: A model that generates bytes at random comes upon all of these.
ODD = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c")


async def lines(*chunks):
    async def stream():
        for chunk in chunks:
            yield chunk

    return [line async for line in event_lines(httpx.Response(200, content=stream()))]


@pytest.mark.parametrize("odd", ODD)
async def test_what_a_model_generates_ends_no_line(odd):
    event = "data: " + json.dumps({"text": f"a{odd}b"}, ensure_ascii=False)
    assert await lines(f"{event}\n\ndata: [DONE]\n\n".encode()) == [event, "", "data: [DONE]", ""]


async def test_an_event_may_come_in_pieces_and_the_last_line_without_its_end():
    assert await lines(b"data: {\xe2\x80", b"\xa8", b"}\r\nda", b"ta: x") == ["data: {\u2028}", "data: x"]
