// client.mjs BASE: Node's http2 client against a dynwire worker. Prints one JSON document with what it saw.
import http2 from 'node:http2';

const base = new URL(process.argv[2]);
const session = http2.connect(base.origin, { settings: { initialWindowSize: 4096 } });
const seen = {};

function request(path, body, headers = {}) {
  return new Promise((resolve, reject) => {
    const method = body === undefined ? 'GET' : 'POST';
    const stream = session.request({ ':method': method, ':path': path, ...headers });
    const pieces = [];
    let status, type, id;
    stream.on('response', (head) => {
      status = head[':status'];
      type = head['content-type'];
      id = head['x-request-id'];
    });
    stream.on('data', (piece) => pieces.push(piece));
    stream.on('error', reject);
    stream.on('end', () => resolve({ status, type, id, body: Buffer.concat(pieces).toString() }));
    stream.end(body);
  });
}

const root = base.pathname;
const json = { 'content-type': 'application/json' };
seen.live = await request('/live');
seen.echo = await request(`${root}/f/w/echo`, '{"a":[1,2]}', { ...json, 'x-request-id': 'from-node' });
const big = JSON.stringify('y'.repeat(300000)); // beyond both windows: the server waits for updates
const back = await request(`${root}/f/w/echo`, big, json);
seen.big = { status: back.status, same: back.body === big + '\n' || back.body === big };
const many = await Promise.all(Array.from({ length: 200 }, (_, i) => request(`${root}/f/w/echo`, `${i}`, json)));
seen.many = many.map((reply) => JSON.parse(reply.body));
const lines = await request(`${root}/f/w/counted_stream`, '{"n":7,"items":5,"size":3}', { ...json, accept: 'application/x-ndjson' });
seen.lines = lines.body.trim().split('\n').map((line) => JSON.parse(line).slice(0, 2));
seen.unknown = await request(`${root}/f/w/nothing`, '1', json);

// a request that is given up: the worker ends its handler, the connection goes on
await new Promise((resolve, reject) => {
  const stream = session.request({ ':method': 'POST', ':path': `${root}/f/w/some_then_wait`, ...json, accept: 'text/event-stream' });
  stream.on('data', () => stream.close(http2.constants.NGHTTP2_CANCEL));
  stream.on('close', resolve);
  stream.on('error', reject);
  stream.end('2');
});
seen.ping = await new Promise((resolve) => session.ping((error) => resolve(error === null)));
seen.after = await request(`${root}/f/w/echo`, '"after"', json);
session.close();
console.log(JSON.stringify(seen));
