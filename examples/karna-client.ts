/**
 * A client for the raw door of Karna WS. No dependencies; runs in browsers and in Node 20 or later.
 *
 *     const karna = new KarnaClient('ws://localhost:8000/ws');
 *     karna.on('notification', ({ message }) => console.log(message));
 *     const { result } = await karna.command('countdown 3', { onProgress: console.log });
 *     karna.answer('confirm', (question) => window.confirm(question)); // the server asks
 *     karna.close();
 *
 * It reconnects by itself and asks for the broadcasts it missed (`?since=`). Requests made while it
 * is not connected are sent once it is. One that was sent when the connection broke is rejected
 * with code `disconnected` and not repeated: the command may have done its work.
 */

export interface ServiceStatus {
  state: 'starting' | 'running' | 'degraded' | 'failed' | 'stopped';
  detail: string;
  since: string;
  [key: string]: unknown;
}
export type Status = Record<string, ServiceStatus>;
export type CommandResult<Result = unknown> = { command: string; result: Result };
export type Notification = { message: string; level: 'info' | 'warning' | 'error'; time: string };
export type Envelope = {
  type: string;
  data: any;
  id?: string | number;
  offset?: string;
  call?: number;
};

/** An `error` answer, or this client's `disconnected`, `closed`, `busy`. `data` has the details. */
export class KarnaError extends Error {
  override readonly name = 'KarnaError';
  readonly code: string;
  readonly data: Record<string, unknown>;
  constructor(code: string, message: string, data: Record<string, unknown> = {}) {
    super(message);
    this.code = code;
    this.data = data;
  }
}

/** What the client tells; `on(event, listener)` gets the value named here. */
export interface KarnaEvents {
  /** Connected. `resumed`: what was missed comes next, unless `gap` says otherwise. */
  open: { resumed: boolean };
  /** The connection ended; `retryInMs` is undefined when it will not be tried again. */
  close: { code: number; reason: string; retryInMs: number | undefined };
  /** The whole status: on connecting, and whenever a service changes. */
  status: Status;
  notification: Notification;
  /** Every broadcast of any type, those with events of their own included. */
  broadcast: Envelope;
  /** Broadcasts were missed that the server no longer has. A fresh `status` follows. */
  gap: KarnaError;
  /** An error that belongs to no request. */
  error: KarnaError;
}

/** What is used of a WebSocket: the browser's, Node 22's and the `ws` package's have it. */
export interface SocketLike {
  send(text: string): void;
  close(code?: number, reason?: string): void;
  terminate?(): void; // of `ws` alone: ends without a closing handshake
  onopen: ((event: any) => void) | null;
  onmessage: ((event: any) => void) | null;
  onerror: ((event: any) => void) | null;
  onclose: ((event: any) => void) | null;
}

export interface KarnaOptions {
  /** Sent as `?token=`, since a browser can set no header on a WebSocket. */
  token?: string;
  /** The WebSocket class where there is no global one (Node 20): `import WebSocket from 'ws'`. */
  WebSocket?: new (url: string) => SocketLike;
  /** First and longest pause before a new try; the real one is random, from half of it up. */
  minDelayMs?: number;
  maxDelayMs?: number;
  /** Silence until the server is asked for a sign of life, and how long that may take. */
  heartbeatMs?: number;
  /** How many requests may wait for a connection; further ones are rejected with code `busy`. */
  maxWaiting?: number;
}

export interface RequestOptions {
  onProgress?: (progress: any) => void;
  /** Aborting rejects at once with the signal's reason, and cancels the command on the server. */
  signal?: AbortSignal;
}

interface Pending {
  send: () => void;
  sent: boolean;
  onProgress: ((progress: any) => void) | undefined;
  settle: (error: unknown, data?: unknown) => void;
}

type Listener = (value: any) => void;
type Answer = (...args: any[]) => unknown;

export class KarnaClient {
  private readonly options: Required<Omit<KarnaOptions, 'token'>>;
  private readonly url: URL;
  private readonly pending = new Map<number, Pending>();
  private readonly listeners = new Map<keyof KarnaEvents, Set<Listener>>();
  private readonly answers = new Map<string, Answer>();
  private socket: SocketLike | undefined;
  private isOpen = false;
  private isClosed = false;
  private offset: string | undefined;
  private lastId = 0;
  private failures = 0;
  private openedAt = 0;
  private retryTimer: ReturnType<typeof setTimeout> | undefined;
  private silenceTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(url: string, options: KarnaOptions = {}) {
    const { token, ...rest } = options;
    const WebSocket = rest.WebSocket ?? (globalThis as KarnaOptions).WebSocket;
    if (!WebSocket) throw new TypeError('No WebSocket here: pass that of the `ws` package.');
    const defaults = { minDelayMs: 500, maxDelayMs: 30_000, heartbeatMs: 30_000, maxWaiting: 100 };
    this.options = { ...defaults, ...rest, WebSocket };
    this.url = new URL(url);
    if (token !== undefined) this.url.searchParams.set('token', token);
    this.connect();
  }

  /** Listen to an event; the function that comes back stops it. */
  on<E extends keyof KarnaEvents>(event: E, listener: (value: KarnaEvents[E]) => void): () => void {
    const known = this.listeners.get(event) ?? new Set<Listener>();
    this.listeners.set(event, known.add(listener));
    return () => void known.delete(listener);
  }

  /**
   * Answer the server's calls of `event` with what the function returns, now or later; what it
   * throws is the error that the server gets.
   */
  answer(event: string, answer: Answer): void {
    this.answers.set(event, answer);
  }

  /** Run a command line; further `params` reach the command by name. Rejects with a KarnaError. */
  command<Result = any>(
    command: string,
    { params, ...options }: RequestOptions & { params?: Record<string, unknown> } = {},
  ): Promise<CommandResult<Result>> {
    return this.request('execute_command', { ...params, command }, options);
  }

  /** The status of all services now. */
  status(options: RequestOptions = {}): Promise<Status> {
    return this.request('get_status', {}, options);
  }

  /** Call any method of the server; resolves with the `data` of its answer. */
  request<Data = any>(method: string, params: object, options: RequestOptions = {}): Promise<Data> {
    const { signal, onProgress } = options;
    return new Promise<Data>((resolve, reject) => {
      signal?.throwIfAborted();
      if (this.isClosed) throw new KarnaError('closed', 'The client was closed.');
      if (!this.isOpen && this.pending.size >= this.options.maxWaiting)
        throw new KarnaError('busy', 'Too many requests wait for a connection.');
      const id = ++this.lastId;
      const abort = () => {
        if (pending.sent && this.isOpen && method === 'execute_command')
          this.write('cancel', { id }, ++this.lastId);
        pending.settle(signal?.reason);
      };
      const pending: Pending = {
        send: () => this.write(method, params, id),
        sent: false,
        onProgress,
        settle: (error, data) => {
          this.pending.delete(id);
          signal?.removeEventListener('abort', abort);
          if (error === undefined) resolve(data as Data);
          else reject(error);
        },
      };
      this.pending.set(id, pending);
      signal?.addEventListener('abort', abort, { once: true });
      if (this.isOpen) this.send(pending);
    });
  }

  /** End the connection for good; requests without an answer are rejected with code `closed`. */
  close(): void {
    if (this.isClosed) return;
    this.isClosed = true;
    clearTimeout(this.retryTimer);
    this.failAll('closed', 'The client was closed.');
    const socket = this.socket;
    if (socket) this.ended(1000, 'closed by the client');
    socket?.close(1000);
  }

  private connect(): void {
    const resumed = this.offset !== undefined;
    if (resumed) this.url.searchParams.set('since', this.offset!);
    const socket = new this.options.WebSocket(this.url.href);
    this.socket = socket;
    // A socket that was given up may still have events under way: they are no longer ours.
    const own = (handle: (event: any) => void) => (event: any) => {
      if (this.socket === socket) handle(event);
    };
    socket.onopen = own(() => this.opened(resumed));
    socket.onmessage = own((event) => this.receive(JSON.parse(event.data)));
    // `close` follows and says the same; but not in Node 22 when a connection was never made
    // (nodejs/undici#3546).
    socket.onerror = own(() => {
      if (!this.isOpen) setTimeout(own(() => this.ended(1006, '')), 100);
    });
    socket.onclose = own((event) => this.ended(event.code, event.reason));
  }

  private opened(resumed: boolean): void {
    this.isOpen = true;
    this.openedAt = Date.now();
    this.heard();
    this.emit('open', { resumed });
    // The answer brings the offset from which to resume, even if no broadcast ever comes.
    if (!resumed) this.refreshStatus();
    for (const pending of this.pending.values()) this.send(pending);
  }

  private send(pending: Pending): void {
    if (pending.sent) return;
    pending.sent = true;
    pending.send();
  }

  private write(method: string, params: object, id: number): void {
    this.socket?.send(JSON.stringify({ method, params, id }));
  }

  private receive(message: Envelope): void {
    this.heard();
    const { type, data, id, offset } = message;
    if (offset !== undefined) this.offset = offset;
    const error = type === 'error' ? new KarnaError(data.code, data.message, data) : undefined;
    if (id !== undefined) {
      const pending = this.pending.get(Number(id)); // none: it was given up
      if (type === 'command_progress') pending?.onProgress?.(data.progress);
      else pending?.settle(error, data);
    } else if (message.call !== undefined) {
      void this.reply(message);
    } else if (error) {
      this.emit(error.code === 'history_gap' ? 'gap' : 'error', error);
      if (error.code === 'history_gap') this.refreshStatus();
    } else {
      if (type === 'status_update') this.emit('status', data);
      if (type === 'notification') this.emit('notification', data);
      this.emit('broadcast', message);
    }
  }

  private async reply({ data: { event, args }, call }: Envelope): Promise<void> {
    const socket = this.socket;
    let params: object;
    try {
      const answer = this.answers.get(event);
      if (!answer) throw new Error(`this client does not answer ${event}`);
      params = { call, data: (await answer(...args)) ?? null };
    } catch (error) {
      params = { call, error: error instanceof Error ? error.message : String(error) };
    }
    // The server forgets its calls with their connection.
    if (this.isOpen && this.socket === socket) this.write('answer', params, ++this.lastId);
  }

  private refreshStatus(): void {
    const lost = () => {}; // with the connection: the next one asks again
    this.status().then((status) => this.emit('status', status), lost);
  }

  /** Any message is a sign of life. After silence ask for one; after more of it, connect anew. */
  private heard(): void {
    clearTimeout(this.silenceTimer);
    this.silenceTimer = setTimeout(() => {
      this.status().catch(() => {});
      this.silenceTimer = setTimeout(() => this.giveUp(), this.options.heartbeatMs);
    }, this.options.heartbeatMs);
  }

  /** The peer is dead: don't wait for the closing handshake, which it never ends. */
  private giveUp(): void {
    const socket = this.socket;
    this.ended(4000, 'no answer');
    if (socket?.terminate) socket.terminate();
    else socket?.close(4000);
  }

  private ended(code: number, reason: string): void {
    clearTimeout(this.silenceTimer);
    this.socket = undefined;
    // A connection that broke soon after it opened counts as a failure, so that pauses grow.
    const lasted = this.isOpen && Date.now() - this.openedAt > 5_000;
    this.failures = lasted ? 1 : this.failures + 1;
    this.isOpen = false;
    const { minDelayMs, maxDelayMs } = this.options;
    const pauseMs = Math.min(maxDelayMs, minDelayMs * 2 ** (this.failures - 1));
    // Jitter: after a restart of the server not all clients come at once.
    const retryInMs = this.isClosed ? undefined : pauseMs * (0.5 + Math.random() / 2);
    if (retryInMs !== undefined) this.retryTimer = setTimeout(() => this.connect(), retryInMs);
    const wereSent = (pending: Pending) => pending.sent;
    this.failAll('disconnected', `The connection ended (${code} ${reason}).`, wereSent);
    this.emit('close', { code, reason, retryInMs });
  }

  private failAll(code: string, message: string, which = (_: Pending) => true): void {
    for (const pending of [...this.pending.values()].filter(which))
      pending.settle(new KarnaError(code, message));
  }

  private emit<E extends keyof KarnaEvents>(event: E, value: KarnaEvents[E]): void {
    for (const listener of [...(this.listeners.get(event) ?? [])]) listener(value);
  }
}
