import { type FormEvent, useEffect, useState } from 'react';
import { io, type Socket } from 'socket.io-client';
import type {
  ClientEvents,
  KarnaError,
  Notification,
  ServerEvents,
  Status,
  WebSocketResponse,
} from './karna';

// `/ws` at the end is the Socket.IO namespace; the client's own path stays `/socket.io/`.
const KARNA_URL = import.meta.env.VITE_KARNA_URL ?? 'ws://localhost:8000/ws';

/** How many lines each list keeps. */
const KEPT = 100;

type Line =
  | { key: number; kind: 'result'; command: string; value: unknown }
  | { key: number; kind: 'error'; error: KarnaError };

let lastKey = 0;
const nextKey = () => ++lastKey;

export function WebSocketComponent() {
  const [socket, setSocket] = useState<Socket<ServerEvents, ClientEvents> | null>(null);
  const [connected, setConnected] = useState(false);
  const [problem, setProblem] = useState('');
  const [status, setStatus] = useState<Status | null>(null);
  const [progress, setProgress] = useState<{ command: string; value: unknown } | null>(null);
  const [lines, setLines] = useState<Line[]>([]);
  const [notifications, setNotifications] = useState<(Notification & { key: number })[]>([]);

  useEffect(() => {
    // With a token set on the server, add: auth: { token: '...' }
    const newSocket: Socket<ServerEvents, ClientEvents> = io(KARNA_URL, {
      transports: ['websocket'],
    });

    newSocket.on('connect', () => {
      console.log('Connected');
      setConnected(true);
      setProblem('');
      // Request initial status
      newSocket.emit('rpc', {
        method: 'get_status',
        params: {},
      });
    });

    newSocket.on('disconnect', (reason) => {
      console.log('Disconnected:', reason);
      setConnected(false);
      setProgress(null); // what ran for us was cancelled with the connection
    });

    newSocket.on('connect_error', (error) => {
      // Refused by the server (a wrong token): it will not try again. Otherwise it will.
      setProblem(newSocket.active ? 'The server cannot be reached; trying again.' : error.message);
    });

    const addLine = (line: Line) => setLines((known) => [line, ...known].slice(0, KEPT));

    newSocket.on('rpc_response', (response: WebSocketResponse) => {
      switch (response.type) {
        case 'command_response':
          setProgress(null);
          addLine({
            key: nextKey(),
            kind: 'result',
            command: response.data.command,
            value: response.data.result,
          });
          break;
        case 'command_progress':
          setProgress({ command: response.data.command, value: response.data.progress });
          break;
        case 'status_update':
          setStatus(response.data);
          break;
        case 'notification':
          setNotifications((known) =>
            [{ ...response.data, key: nextKey() }, ...known].slice(0, KEPT),
          );
          break;
        case 'error':
          setProgress(null);
          addLine({ key: nextKey(), kind: 'error', error: response.data });
          break;
      }
    });

    setSocket(newSocket);

    return () => {
      newSocket.disconnect();
    };
  }, []);

  const sendCommand = (command: string) => {
    if (socket) {
      socket.emit('rpc', {
        method: 'execute_command',
        params: { command },
      });
    }
  };

  return (
    <main>
      <header>
        <h1>Karna</h1>
        <p role="status" className={connected ? 'badge running' : 'badge failed'}>
          {connected ? 'connected' : 'not connected'}
        </p>
      </header>
      {problem && <p role="alert">{problem}</p>}
      <StatusBadges status={status} />
      <CommandBox connected={connected} sendCommand={sendCommand} />
      {progress && (
        <p className="progress" aria-live="polite">
          {progress.command}: {asText(progress.value)}
        </p>
      )}
      <section aria-label="Results">
        <h2>Results</h2>
        <ol className="results">
          {lines.map((line) => (
            <ResultLine key={line.key} line={line} onSuggestion={sendCommand} />
          ))}
        </ol>
      </section>
      <section aria-label="Notifications">
        <h2>Notifications</h2>
        <ol className="notifications" aria-live="polite">
          {notifications.map(({ key, level, message, time }) => (
            <li key={key} className={level}>
              <time dateTime={time}>{new Date(time).toLocaleTimeString()}</time> {message}
            </li>
          ))}
        </ol>
      </section>
    </main>
  );
}

function StatusBadges({ status }: { status: Status | null }) {
  if (!status) return <p>Waiting for the status of the services…</p>;
  return (
    <ul className="services" aria-label="Services">
      {Object.entries(status).map(([name, { state, detail }]) => (
        <li key={name} className={`badge ${state}`} title={detail}>
          {name}: {state}
        </li>
      ))}
    </ul>
  );
}

interface CommandBoxProps {
  connected: boolean;
  sendCommand: (command: string) => void;
}

function CommandBox({ connected, sendCommand }: CommandBoxProps) {
  const [text, setText] = useState('');

  const submit = (event: FormEvent) => {
    event.preventDefault();
    const command = text.trim();
    // Without a connection socket.io-client would keep it and run it whenever it is back.
    if (!command || !connected) return;
    sendCommand(command);
    setText('');
  };

  return (
    <form onSubmit={submit}>
      <label htmlFor="command">Command</label>
      <input
        id="command"
        value={text}
        onChange={(event) => setText(event.target.value)}
        placeholder="help"
        autoComplete="off"
        spellCheck={false}
      />
      <button disabled={!connected}>Run</button>
    </form>
  );
}

interface ResultLineProps {
  line: Line;
  onSuggestion: (command: string) => void;
}

function ResultLine({ line, onSuggestion }: ResultLineProps) {
  if (line.kind === 'result') {
    return (
      <li>
        <code>{line.command}</code>
        <pre>{asText(line.value)}</pre>
      </li>
    );
  }
  const { code, message, command, suggestions = [] } = line.error;
  return (
    <li className="error">
      <code>{command ?? code}</code>
      <p>{message}</p>
      {suggestions.map((suggestion) => (
        <button key={suggestion} onClick={() => onSuggestion(suggestion)}>
          {suggestion}
        </button>
      ))}
    </li>
  );
}

/** A text as it is, anything else as indented JSON. */
function asText(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value, null, 2);
}
