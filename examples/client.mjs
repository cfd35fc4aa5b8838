// Both WebSocket doors of Karna WS from Node 20 or later.
//
//     npm install ws socket.io-client
//     node examples/client.mjs [ws://localhost:8000/ws]
//
// With a token set on the server: KARNA_TOKEN=... node examples/client.mjs

import { once } from 'node:events';
import { io } from 'socket.io-client';

const url = process.argv[2] ?? 'ws://localhost:8000/ws';
const token = process.env.KARNA_TOKEN;

await useRawDoor();
await useSocketIo();

/** The raw door: one JSON message a frame; the `id` tells which answer belongs to which request. */
async function useRawDoor() {
  // Node 22 has WebSocket; before it the `ws` package has the same interface.
  const WebSocket = globalThis.WebSocket ?? (await import('ws')).default;
  const address = new URL(url);
  if (token) address.searchParams.set('token', token);
  const socket = new WebSocket(address);
  await new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = (event) => reject(new Error(event.message || `cannot reach ${url}`));
  });

  const status = await request('get_status');
  for (const [name, { state, detail }] of Object.entries(status)) {
    console.log(`raw: ${name} is ${state}${detail && ` (${detail})`}`);
  }
  // Requests with different ids run at the same time.
  const [slow, quick] = await Promise.all([
    request('execute_command', { command: 'countdown 1' }),
    request('execute_command', { command: 'echo hello' }),
  ]);
  console.log('raw:', quick.command, '->', quick.result);
  console.log('raw:', slow.command, '->', slow.result);
  await request('execute_command', { command: 'no-such-command' }).catch((error) => {
    console.log('raw: refused with', error.message);
  });
  socket.close();

  function request(method, params = {}) {
    const id = `${method}-${Math.random()}`;
    socket.send(JSON.stringify({ method, params, id }));
    return new Promise((resolve, reject) => {
      socket.addEventListener('message', function listen({ data: text }) {
        const { type, data, id: answered } = JSON.parse(text);
        if (answered !== id) return; // another request's answer, or a broadcast
        if (type === 'command_progress') {
          console.log('raw:', data.command, 'reports', data.progress);
          return;
        }
        socket.removeEventListener('message', listen);
        if (type === 'error') reject(new Error(`${data.code}: ${data.message}`));
        else resolve(data);
      });
    });
  }
}

/** The Socket.IO door: socket.io-client with its websocket transport; an ack brings the answer. */
async function useSocketIo() {
  const socket = io(url, { transports: ['websocket'], auth: { token } });
  socket.on('rpc_response', ({ type, data }) => {
    if (type === 'notification') console.log('socket.io: notification:', data.message);
  });
  // Only for this example: a page would rather wait until the server is back.
  socket.on('connect_error', (error) => {
    console.error('socket.io:', error.message);
    process.exit(1);
  });
  await once(socket, 'connect');

  const run = (command, params = {}) =>
    socket.timeout(5000).emitWithAck('rpc', {
      method: 'execute_command',
      params: { command, ...params },
    });
  console.log('socket.io: echo hello ->', (await run('echo hello')).data.result);

  // Bytes travel as they are: a PNG of one pixel for the vision service.
  const pixel =
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E' +
    'rkJggg==';
  const image = Buffer.from(pixel, 'base64');
  const described = await run('describe', { image });
  console.log('socket.io: describe ->', described.data.result ?? described.data.message);

  // A broadcast goes to every client, on both doors; ours comes back to us too.
  const notified = new Promise((resolve) => {
    socket.on('rpc_response', ({ type }) => type === 'notification' && resolve());
  });
  await run('notify Hello from Node');
  await notified;
  socket.disconnect();
}
