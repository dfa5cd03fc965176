// Node's http2, both roles, by the line protocol of common.py. The stream API is the fastest that it has.
import fs from 'node:fs';
import http2 from 'node:http2';
import readline from 'node:readline';

const [role, setupText, constantsText] = process.argv.slice(2);
const setup = JSON.parse(setupText);
const constants = JSON.parse(constantsText); // of common.py: paths and bodies
const { ECHO_PATH, JSON_PATH, CHUNKS_PATH, LIVE_PATH, CHUNKS } = constants;
const LIVE_BODY = Buffer.from(constants.LIVE_BODY);
const CHUNK = Buffer.from(constants.CHUNK);
const say = (message) => fs.writeSync(1, JSON.stringify(message) + '\n');

function collect(stream, done) {
  let first = null;
  let more = null;
  stream.on('data', (chunk) => {
    if (first === null) first = chunk;
    else (more ??= [first]).push(chunk);
  });
  stream.on('end', () => {
    if (!stream.destroyed && !stream.aborted) done(more !== null ? Buffer.concat(more) : first ?? Buffer.alloc(0));
  });
}

function server() {
  const serving = http2.createServer({ settings: { maxConcurrentStreams: constants.MAX_HTTP_STREAMS } });
  const octets = { ':status': 200, 'content-type': 'application/octet-stream' };
  const json = { ':status': 200, 'content-type': 'application/json' };
  serving.on('sessionError', () => {}); // h2_streams.py closes its connection with requests open
  serving.on('stream', (stream, headers) => {
    stream.on('error', () => {});
    const path = headers[':path'];
    if (path === ECHO_PATH) {
      collect(stream, (body) => {
        stream.respond(octets);
        stream.end(body);
      });
    } else if (path === JSON_PATH) {
      collect(stream, (body) => {
        stream.respond(json);
        stream.end(JSON.stringify(JSON.parse(body)));
      });
    } else if (path === CHUNKS_PATH) {
      collect(stream, () => {
        stream.respond(octets);
        for (let i = 0; i < CHUNKS; i++) stream.write(CHUNK);
        stream.end();
      });
    } else if (path === LIVE_PATH) {
      stream.respond({ ':status': 200, 'content-type': 'text/plain' });
      stream.end(LIVE_BODY);
    } else {
      stream.respond({ ':status': 404 }, { endStream: true });
    }
  });
  serving.listen(0, '127.0.0.1', () => say({ port: serving.address().port }));
  process.stdin.resume().on('end', () => process.exit(0));
}

// CPU seconds of all threads of a process; /proc/PID/stat counts in ticks of 10 ms only.
function cpuSeconds(pid) {
  let total = 0;
  for (const task of fs.readdirSync(`/proc/${pid}/task`)) {
    total += Number(fs.readFileSync(`/proc/${pid}/task/${task}/schedstat`, 'latin1').split(' ')[0]);
  }
  return total / 1e9;
}

async function client() {
  const session = http2.connect(`http://127.0.0.1:${setup.port}`, { settings: { initialWindowSize: 1 << 20 } });
  await new Promise((resolve, reject) => session.once('connect', resolve).once('error', reject));
  const known = new Map();
  const call = (payload) =>
    new Promise((resolve, reject) => {
      const request = session.request({ ':method': 'POST', ':path': ECHO_PATH, 'content-type': 'application/octet-stream' });
      let status = 0;
      request.on('response', (headers) => (status = headers[':status']));
      request.on('error', reject);
      collect(request, (body) => (status === 200 ? resolve(body) : reject(new Error(`status ${status}`))));
      request.end(payload);
    });

  async function run(command, count, payload) {
    const latencies = [];
    const worker = async () => {
      for (let i = 0; i < count; i++) {
        const t = process.hrtime.bigint();
        await call(payload);
        latencies.push(Number(process.hrtime.bigint() - t));
      }
    };
    const server0 = cpuSeconds(setup.server_pid);
    const client0 = process.cpuUsage();
    const started = process.hrtime.bigint();
    await Promise.all(Array.from({ length: command.concurrency }, worker));
    const seconds = Number(process.hrtime.bigint() - started) / 1e9;
    const used = process.cpuUsage(client0);
    const calls = count * command.concurrency;
    latencies.sort((a, b) => a - b);
    const at = (quantile) => latencies[Math.min(latencies.length - 1, Math.floor(latencies.length * quantile))] / 1e3;
    return {
      calls, units: calls, seconds, p50_us: at(0.5), p99_us: at(0.99), samples: calls,
      cpu_client: (used.user + used.system) / 1e6, cpu_server: cpuSeconds(setup.server_pid) - server0,
    };
  }

  say({ ready: true });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    try {
      const payload = Buffer.alloc(command.size, 'x');
      if (!(await call(payload)).equals(payload)) throw new Error('echo came back different');
      const key = JSON.stringify([command.kind, command.size, command.concurrency, command.seconds]);
      let count = known.get(key);
      if (count === undefined) {
        let took = 0;
        for (count = 1; took < 1.0; count *= 2) took = (await run(command, count, payload)).seconds; // long: the JIT compiler is at work
        count = Math.max(1, Math.floor(((count / 2) * command.seconds) / took));
        known.set(key, count);
      } else {
        await run(command, Math.max(1, count >> 3), payload);
      }
      say(await run(command, count, payload));
    } catch (error) {
      say({ error: String(error) });
    }
  }
  session.close();
}

role === 'server' ? server() : await client();
