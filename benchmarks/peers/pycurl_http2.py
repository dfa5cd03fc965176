"""pycurl (libcurl over nghttp2): ``easy`` handles that block, and one ``multi`` with many requests on one connection."""

import common
import pycurl


def handle(url, payload):
    curl = pycurl.Curl()
    chunks = []
    curl.setopt(pycurl.URL, url)
    curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE)
    curl.setopt(pycurl.HTTPHEADER, [f"content-type: {common.OCTETS}"])
    curl.setopt(pycurl.POST, 1)
    curl.setopt(pycurl.POSTFIELDS, payload)
    curl.setopt(pycurl.WRITEFUNCTION, chunks.append)
    curl.setopt(pycurl.PIPEWAIT, 1)  # on the connection that is being made, not on one of its own
    curl.setopt(pycurl.NOPROXY, "*")
    return curl, chunks


def taken(curl, chunks):
    status = curl.getinfo(pycurl.RESPONSE_CODE)
    if status != 200:
        raise RuntimeError(f"status {status}")
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    chunks.clear()
    return body


class Client(common.SyncClient):
    def __init__(self, url):
        self.url = url

    def caller(self, thread, kind):
        curl, chunks = None, None

        def call(payload):
            nonlocal curl, chunks
            if curl is None:
                curl, chunks = handle(self.url, payload)  # every later call of this thread sends the same payload
            curl.perform()
            return taken(curl, chunks)

        return call

    def pipeline(self, payload, in_flight, count, latencies):
        multi = pycurl.CurlMulti()
        multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
        multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, 1)
        chunks_of, started_at, handles, left = {}, {}, [], count
        for _ in range(min(in_flight, count)):
            curl, chunks = handle(self.url, payload)
            handles.append(curl)
            chunks_of[curl], started_at[curl] = chunks, common.now_ns()
            multi.add_handle(curl)
            left -= 1
        under_way = len(handles)
        while under_way:
            multi.perform()
            queued = 1
            while queued:
                queued, good, bad = multi.info_read()
                if bad:
                    raise RuntimeError(f"curl {bad[0][1]}: {bad[0][2]}")
                for curl in good:
                    latencies.append(common.now_ns() - started_at[curl])
                    multi.remove_handle(curl)
                    if len(taken(curl, chunks_of[curl])) != len(payload):
                        raise RuntimeError("wrong reply")
                    if left:
                        left -= 1
                        started_at[curl] = common.now_ns()
                        multi.add_handle(curl)
                    else:
                        under_way -= 1
            if under_way:
                multi.select(1.0)
        for curl in handles:
            curl.close()
        multi.close()


def client(setup):
    common.sync_client(setup, Client(f"http://127.0.0.1:{setup['port']}{common.ECHO_PATH}"))


if __name__ == "__main__":
    common.entry(None, client)
