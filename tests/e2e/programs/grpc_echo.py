"""A gRPC service that sends back what it gets, one message or a stream of them, and its client."""

import sys
from concurrent import futures

import grpc


def serve(port):
    def one(request, _):
        return request

    def many(requests, _):
        yield from requests

    handlers = {"One": grpc.unary_unary_rpc_method_handler(one), "Many": grpc.stream_stream_rpc_method_handler(many)}
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def call(target):
    with grpc.insecure_channel(target) as channel:
        one = channel.unary_unary("/test.Echo/One")
        many = channel.stream_stream("/test.Echo/Many")
        good = sum(one(str(n).encode(), timeout=10) == str(n).encode() for n in range(100))
        large = bytes(1_000_000)
        back = list(many(iter([large, b"x", large]), timeout=20))
        print("good", good, "stream", [len(message) for message in back], flush=True)


{"serve": serve, "call": call}[sys.argv[1]](sys.argv[2])
