"""What a frontend tells its supervisor of each request that ends, however it ends."""

import msgspec

from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.messages import Accepted, Cancel, Delta, Done, Error, Generate, Sampling
from graphgen.ipc.server_messages import RequestEnded
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import IDS, Frontend


def reported(frontend: Frontend) -> RequestEnded:
    message = frontend.supervisor.receive(5.0)
    assert isinstance(message, RequestEnded), message
    return message


def test_every_end_is_told_with_its_figures(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(log_requests=True)
    client = frontend.welcome()
    client.send(IDS)
    client.expect(Accepted)
    request_id = frontend.scheduler.expect(Submit).request_id
    frontend.scheduler.send_tokens(request_id, [5], None)
    frontend.scheduler.send_tokens(request_id, [6], "stop")
    client.expect(Delta)
    served = reported(frontend)
    assert (served.request_id, served.prompt_tokens, served.output_tokens, served.finish) == (1, 3, 2, ("stop",))
    assert 0 < served.first_token_ms <= served.total_ms < 5000
    assert (served.key, served.address) == ("", "127.0.0.1")
    while not isinstance(client.receive(), Done):
        pass

    client.send(msgspec.structs.replace(IDS, id=2))
    client.expect(Accepted)
    client.send(Cancel(id=2))
    cancelled = reported(frontend)
    assert (cancelled.request_id, cancelled.output_tokens, cancelled.finish) == (2, 0, ("aborted",))
    client.expect(Delta)
    client.expect(Done)

    client.send(Generate(id=3, text="a secret", sampling=Sampling(max_tokens=-1)))
    assert client.expect(Error).code == "bad_request"
    refused = reported(frontend)
    assert (refused.request_id, refused.prompt_tokens, refused.finish) == (3, 0, ("bad_request",))


def test_no_report_holds_what_was_said_or_who_may_speak_for_a_session(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(log_requests=True)
    client = frontend.welcome()
    client.send(Generate(id=1, text="a secret"))
    client.expect(Accepted)
    frontend.scheduler.send_tokens(frontend.scheduler.expect(Submit).request_id, [5], "stop")
    written = msgspec.msgpack.encode(reported(frontend))
    assert b"secret" not in written
    assert client.session.encode() not in written


def test_nothing_is_told_where_requests_are_not_logged(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(log_requests=False)
    client = frontend.welcome()
    client.send(IDS)
    client.expect(Accepted)
    frontend.scheduler.send_tokens(frontend.scheduler.expect(Submit).request_id, [5], "stop")
    while not isinstance(client.receive(), Done):
        pass
    assert frontend.supervisor.receive(0.2) is None
