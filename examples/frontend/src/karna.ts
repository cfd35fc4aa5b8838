/** The wire format of Karna WS: what `rpc` sends and what `rpc_response` brings. */

/** A request, as sent with `socket.emit('rpc', message)`. */
export interface WebSocketMessage {
  method: 'execute_command' | 'get_status' | 'cancel';
  params?: {
    command?: string;
    [key: string]: unknown;
  };
  /** Comes back in every answer to this request; without one, commands are answered in order. */
  id?: string | number;
}

export type ServiceState = 'starting' | 'running' | 'degraded' | 'failed' | 'stopped';

export interface ServiceStatus {
  state: ServiceState;
  /** One line for a person. */
  detail: string;
  /** When the state last changed, RFC 3339 in UTC. */
  since: string;
  /** Whatever else the service tells about itself. */
  [key: string]: unknown;
}

/** Always the whole object; a server may have more services than these three. */
export interface Status {
  vision: ServiceStatus;
  language: ServiceStatus;
  command: ServiceStatus;
  [service: string]: ServiceStatus;
}

export interface CommandResult {
  /** The command line as it was sent. */
  command: string;
  result: unknown;
}

export interface CommandProgress {
  command: string;
  progress: unknown;
}

export interface Notification {
  message: string;
  level: 'info' | 'warning' | 'error';
  /** RFC 3339 in UTC. */
  time: string;
}

export interface KarnaError {
  /** For programs: `unknown_command`, `usage`, `command_failed`, `timeout`, `unavailable`, ... */
  code: string;
  /** For people. */
  message: string;
  command?: string;
  suggestions?: string[];
  [key: string]: unknown;
}

interface Envelope<Type extends string, Data> {
  type: Type;
  data: Data;
  /** The id of the request this answers; broadcasts have none. */
  id?: string | number;
  /** Where a broadcast stands in the server's history. */
  offset?: string;
}

/** What the server sends, told apart by `type`. */
export type WebSocketResponse =
  | Envelope<'command_response', CommandResult>
  | Envelope<'command_progress', CommandProgress>
  | Envelope<'status_update', Status>
  | Envelope<'notification', Notification>
  | Envelope<'error', KarnaError>;

/** For `Socket<ServerEvents, ClientEvents>`: socket.io-client then checks every `on` and `emit`. */
export interface ServerEvents {
  rpc_response: (response: WebSocketResponse) => void;
}

export interface ClientEvents {
  rpc: (message: WebSocketMessage, acknowledge?: (response: WebSocketResponse) => void) => void;
}
