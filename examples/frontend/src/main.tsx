import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { ErrorBoundary } from './ErrorBoundary';
import { WebSocketComponent } from './WebSocketComponent';
import './style.css';

createRoot(document.getElementById('root')!).render(
  <StrictMode>
    <ErrorBoundary>
      <WebSocketComponent />
    </ErrorBoundary>
  </StrictMode>,
);
