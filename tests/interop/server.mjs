// server.mjs MODE PORT: a server on Node's http2 (nghttp2) that speaks to dynwire's client.
// Paths: .../echo sends the body back under its own type; .../items sends N items in dynwire's own format; .../page fails.
// Prints what the tests want to know about: one line per session and per stream.
import http2 from 'node:http2';

const [mode, port] = process.argv.slice(2);
const { NGHTTP2_REFUSED_STREAM, PADDING_STRATEGY_MAX, PADDING_STRATEGY_NONE } = http2.constants;
const say = (text) => process.stdout.write(text + '\n');

const server = http2.createServer({
  paddingStrategy: mode === 'padded' ? PADDING_STRATEGY_MAX : PADDING_STRATEGY_NONE,
  settings: {
    ...(mode === 'one-stream' && { maxConcurrentStreams: 1 }),
    ...(mode === 'tiny-windows' && { initialWindowSize: 7 }),
    ...(mode === 'no-table' && { headerTableSize: 0 }),
  },
});

function item(kind, text) {
  const body = Buffer.from(text);
  const head = Buffer.alloc(5);
  head.writeUInt8(kind, 0);
  head.writeUInt32BE(body.length, 1);
  return Buffer.concat([head, body]);
}

let sessions = 0;
let refused = false;
let ended = false;
server.on('session', (session) => {
  session.number = ++sessions;
  session.open = session.most = session.total = 0;
  say(`session ${session.number}`);
  session.on('error', (error) => say(`session error ${error.message}`));
});
server.on('sessionError', (error) => say(`session error ${error.message}`));

server.on('stream', (stream, headers) => {
  const session = stream.session;
  session.total += 1;
  stream.on('error', (error) => say(`stream error ${error.message}`));
  if (mode === 'refuse-first' && !refused) {
    refused = true;
    say('refused');
    stream.close(NGHTTP2_REFUSED_STREAM);
    return;
  }
  if (mode === 'goaway' && !ended && session.total === 3) {
    ended = true;
    // only the first two are answered; what comes later was not looked at, and the caller may send it elsewhere
    say('goaway');
    session.goaway(0, stream.id - 2);
    return;
  }
  session.open += 1;
  session.most = Math.max(session.most, session.open);
  const body = [];
  stream.on('data', (piece) => body.push(piece));
  stream.on('end', () => {
    const data = Buffer.concat(body);
    const path = headers[':path'];
    const answer = () => {
      if (path.endsWith('/items')) {
        const count = JSON.parse(data);
        stream.respond({ ':status': 200, 'content-type': 'application/vnd.dynwire.items' });
        // in pieces that end anywhere
        const all = Buffer.concat(Array.from({ length: count }, (_, i) => item(2, JSON.stringify({ i, text: 'x'.repeat(i) }))));
        for (let at = 0; at < all.length; at += 1000) stream.write(all.subarray(at, at + 1000));
        stream.end();
      } else if (path.endsWith('/trailers')) {
        stream.respond({ ':status': 200, 'content-type': 'application/json' }, { waitForTrailers: true });
        stream.on('wantTrailers', () => stream.sendTrailers({ 'x-checksum': 'none' }));
        stream.end(data);
      } else if (path.endsWith('/informational')) {
        stream.additionalHeaders({ ':status': 103, link: '</x>; rel=preload' });
        stream.respond({ ':status': 200, 'content-type': 'application/json' });
        stream.end(data);
      } else if (path.endsWith('/headers')) {
        stream.respond({ ':status': 200, 'content-type': 'application/json' });
        stream.end(JSON.stringify(headers));
      } else if (path.endsWith('/login')) {
        stream.respond({ ':status': 200, 'content-type': 'text/html' });
        stream.end('<p>please log in');
      } else if (path.endsWith('/page')) {
        stream.respond({ ':status': 503, 'content-type': 'text/html' });
        stream.end('<html><head><title>x</title></head><body><h1>out to lunch</h1></body></html>');
      } else {
        stream.respond({ ':status': 200, 'content-type': headers['content-type'] });
        stream.end(data);
      }
      session.open -= 1;
      if (mode === 'fewer-streams' && session.total === 1) session.settings({ maxConcurrentStreams: 2 }, () => say('lowered'));
      if (mode === 'close' && !ended && session.total === 2) {
        ended = true;
        session.close();
        say('leaving');
      }
    };
    // a moment, so that requests overlap where the peer sends them at once
    mode === 'one-stream' || mode === 'fewer-streams' ? setTimeout(answer, 5) : answer();
  });
  stream.on('close', () => say(`closed ${session.number} ${stream.id} most ${session.most}`));
});

server.listen(Number(port), '127.0.0.1');
