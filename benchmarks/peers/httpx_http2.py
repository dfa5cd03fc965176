"""httpx.AsyncClient with HTTP/2 only (httpcore, h2): one client, one connection."""

import common
import httpx


class Client(common.AsyncClient):
    def __init__(self, client, url):
        self.client, self.url = client, url

    def caller(self, kind):
        post, url, headers = self.client.post, self.url, {"content-type": common.OCTETS}

        async def call(payload):
            reply = await post(url, content=payload, headers=headers)
            if reply.status_code != 200:
                raise RuntimeError(f"status {reply.status_code}")
            return reply.content

        return call


def client(setup):
    async def main():
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(http1=False, http2=True, limits=limits, timeout=30, trust_env=False) as one:
            await common.async_client(setup, Client(one, f"http://127.0.0.1:{setup['port']}{common.ECHO_PATH}"))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(None, client)
